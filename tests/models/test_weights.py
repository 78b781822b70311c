from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ackd_lightning import CE, DataInfo, DistillationModule, StudentConfig, load_student
from ackd_lightning.errors import ACKDError
from ackd_lightning.models import weights
from ackd_lightning.models.weights import check_fit, load_weights, read_metadata, save_weights
from ackd_lightning.models.zoo import create_model


def small(num_classes: int = 5, *, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = create_model("resnet8", num_classes)
    for buffer in model.buffers():  # so that buffers that are not loaded are noticed
        buffer.add_(seed)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def refused(model: nn.Module, path: object, **options: str) -> str:
    """Return the sentence of the error, once the model is known to be untouched."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ACKDError) as caught:
        load_weights(model, path, **options)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def prefixed(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in model.state_dict().items()}


def test_safetensors_round_trip_with_metadata(tmp_path):
    source, target = small(), small(seed=2)
    notes = {"val_acc": "0.7", "data": "cifar100 ä"}
    file = save_weights(source, tmp_path / "new" / "folder" / "a.safetensors", notes)
    assert file == tmp_path / "new" / "folder" / "a.safetensors"
    assert not same(source, target)
    assert load_weights(target, str(file)) == notes
    assert same(source, target)
    assert read_metadata(file) == notes
    assert [entry.name for entry in file.parent.iterdir()] == ["a.safetensors"]


def test_a_network_whose_modules_read_the_version_of_their_tensors(tmp_path):
    """torchvision's MNASNet loads nothing that states none, as a ``.safetensors`` file does."""
    torch.manual_seed(0)
    source, target = create_model("mnasnet0_5", 4), create_model("mnasnet0_5", 4)
    load_weights(target, save_weights(source, tmp_path / "a.safetensors"))
    assert same(source, target)
    start = StudentConfig("mnasnet0_5", weights=str(tmp_path / "a.safetensors"))
    module = DistillationModule(start, method=CE(), data=DataInfo(4, 32))
    module.save_student(tmp_path / "student.safetensors")
    assert same(load_student(tmp_path / "student.safetensors"), source)


def test_state_dict_can_be_saved_without_metadata(tmp_path):
    source, target = small(), small(seed=2)
    file = save_weights(source.state_dict(), tmp_path / "a.safetensors")
    assert load_weights(target, file) == read_metadata(file) == {}
    assert same(source, target)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("wrap", "metadata"),
    [
        (lambda state: state, {}),
        (
            lambda state: {"epoch": 240, "model": state, "best_acc": torch.tensor(73.5), "optimizer": {"lr": 1}},
            {"epoch": "240", "best_acc": "73.5"},
        ),
        (lambda state: {"state_dict": state, "arch": "resnet8"}, {"arch": "resnet8"}),
        (lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}}, {}),
        (lambda state: {f"_orig_mod.{key}": value for key, value in state.items()}, {}),
        (lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}}, {}),
    ],
    ids=["plain", "model", "state_dict", "module", "compiled", "both"],
)
def test_files_of_torch_save(tmp_path, wrap, metadata, zipped):
    source, target = small(), small(seed=2)
    file = tmp_path / "teacher.pth"
    torch.save(wrap(source.state_dict()), file, _use_new_zipfile_serialization=zipped)
    assert load_weights(target, file) == metadata
    assert same(source, target)


@pytest.mark.parametrize("inner", ["", "_orig_mod."])
def test_our_checkpoint_gives_the_target_learner_alone(tmp_path, inner):
    source, target = small(), small(seed=2)
    state = prefixed(source, f"student.{inner}backbone.")
    state |= {
        "student.branches.0.fc.weight": torch.zeros(2),
        "fc.weight": torch.zeros(3),
        "attention.weight": torch.ones(1),
    }
    checkpoint = {"state_dict": state, "epoch": 3, "global_step": 12, "optimizer_states": [{"lr": 0.1}], "loops": {}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert load_weights(target, tmp_path / "last.ckpt") == {"epoch": "3", "global_step": "12"}
    assert same(source, target)


def test_checkpoint_that_lightning_wrote(tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, rate: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.student = nn.ModuleDict({"backbone": small(), "other": nn.Linear(2, 2)})

        def training_step(self, batch):
            return self.student["backbone"](batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    target = small(seed=2)
    metadata = load_weights(target, tmp_path / "last.ckpt")
    assert same(module.student["backbone"], target)
    assert metadata["epoch"] == "0"
    assert metadata["pytorch-lightning_version"] == lightning.__version__


def test_keys_that_the_model_has_itself_are_not_shortened(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.module = nn.ModuleDict({"_orig_mod": nn.Linear(2, 3)})

    class Trained(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.student = nn.ModuleDict({"backbone": nn.Linear(2, 3), "branch": nn.Linear(2, 3)})

    for kind in (Wrapped, Trained):
        source, target = kind(1), kind(2)
        load_weights(target, save_weights(source, tmp_path / "a.safetensors"))
        assert same(source, target)


def test_half_precision_files_fill_a_float_model(tmp_path):
    source, target = small().to(torch.bfloat16), small(seed=2)
    load_weights(target, save_weights(source, tmp_path / "a.safetensors"))
    assert target.fc.weight.dtype == torch.float32
    assert torch.equal(target.fc.weight, source.fc.weight.float())


def test_channels_last_shared_and_sliced_tensors_are_saved(tmp_path):
    shared = torch.randn(4, 6)
    state = {
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "turned": shared.t(),
        "shared": shared,
        "part": shared[:, ::2],
        "scalar": torch.tensor(3),
    }
    loaded = load_file(save_weights(state, tmp_path / "a.safetensors"))
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "address", ["https://example.org/a.pth", "s3://bucket/a.pth", "file:///tmp/a.pth", "hf-hub:/x/y"]
)
@pytest.mark.parametrize("convert", [str, Path])
def test_addresses_are_refused(tmp_path, address, convert):
    path = convert(address)
    assert "URL" in refused(small(), path)
    assert "download" in refused(small(), path)
    with pytest.raises(ACKDError, match="URL"):
        save_weights(small(), path)
    with pytest.raises(ACKDError, match="URL"):
        read_metadata(path)


def test_missing_file_and_folder(tmp_path):
    absent = tmp_path / "none.safetensors"
    assert (
        refused(small(), absent) == f"weight file {absent} does not exist; correct the path, or create the file first"
    )
    assert refused(small(), tmp_path) == f"{tmp_path} is a folder; name the weight file in it"
    for path in (absent, tmp_path):
        with pytest.raises(ACKDError, match="weight file"):
            read_metadata(path)


def test_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_weights(small(), tmp_path / "a.safetensors", {"seed": "1"})
    assert load_weights(small(), "~/a.safetensors") == {"seed": "1"}


def test_unreadable_file(tmp_path, monkeypatch):
    file = save_weights(small(), tmp_path / "a.safetensors")

    def forbid(*_: object, **__: object) -> None:  # a test that runs as root can read whatever its mode is
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbid)
    assert refused(small(), file) == f"{file} cannot be read (Permission denied); check its permissions"


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_truncated_file(tmp_path, kind, kept):
    file = tmp_path / f"a.{kind}"
    if kind == "safetensors":
        save_weights(small(), file)
    else:
        torch.save(small().state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    message = refused(small(), file)
    assert message.startswith(f"{file} is truncated or is not a weight file (")
    assert message.endswith("fetch or make it again")


def test_truncated_safetensors_has_no_metadata_either(tmp_path):
    file = save_weights(small(), tmp_path / "a.safetensors", {"seed": "1"})
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ACKDError, match="truncated"):
        read_metadata(file)


def foreign_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "hello")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_text("<html>not found</html>"), "is neither a .safetensors file nor one"),
        (lambda file: file.write_text('{"some": {"json": 1}}'), "is neither"),
        (lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "is neither"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (foreign_zip, "truncated or is not a weight file"),
        (lambda file: file.write_bytes(pickle.dumps([1, 2], protocol=4)), "truncated or is not a weight file"),
        (lambda file: torch.save([torch.ones(1)], file), "holds a list"),
        (lambda file: torch.save({}, file), "holds no tensors"),
        (lambda file: torch.save({"model": {}}, file), "holds no tensors"),
        (lambda file: torch.save({"fun": {"w": torch.ones(1)}}, file), "keys are missing"),
        (lambda file: torch.save({"model": {"w": torch.ones(1), "step": 3}}, file), "its entry 'step' is a int"),
        (lambda file: torch.save({3: torch.ones(1)}, file), "its entry 3 is a Tensor"),
        (lambda file: save_file({}, file), "holds no tensors"),
    ],
)
def test_foreign_file(tmp_path, write, said):
    file = tmp_path / "some file"
    write(file)
    message = refused(small(), file)
    assert said in message
    assert message.startswith(str(file))
    assert "; " in message


def test_metadata_of_another_kind_of_file(tmp_path):
    torch.save(small().state_dict(), tmp_path / "a.pth")
    with pytest.raises(ACKDError, match=r"not a \.safetensors file"):
        read_metadata(tmp_path / "a.pth")


class Harm:
    """Would write a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save({"model": small().state_dict(), "opt": Harm(tmp_path / "harm")}, tmp_path / "a.pth")
    message = refused(small(), tmp_path / "a.pth")
    assert "holds Python objects besides tensors (" in message
    assert "if you trust the file" in message
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "name", ["resnet8", "wrn_16_2", "mobilenetv2_x0_5", "shufflenetv1", "resnet18", "squeezenet1_1"]
)
def test_another_number_of_classes_is_recognised(tmp_path, name):
    file = save_weights(create_model(name, 7), tmp_path / "a.safetensors")
    message = refused(create_model(name, 5), file, name=name)
    assert message == (
        f"{file} has 7 classes and {name} has 5, everything else agrees; "
        f"build {name} with num_classes=7, or give weights for 5 classes"
    )


def test_a_file_for_a_deeper_network_is_summed_up(tmp_path):
    file = save_weights(create_model("resnet20", 5), tmp_path / "a.safetensors")
    message = refused(small(), file, name="resnet8")
    count = len(create_model("resnet20", 5).state_dict()) - len(small().state_dict())
    assert f"{file} does not fit resnet8: {count} of the file's 128 keys are unexpected (layer1.1.bn1.bias" in message
    assert message.count("layer") == 3
    assert "missing" not in message
    assert "shape" not in message


def test_a_file_for_a_shallower_network_is_summed_up(tmp_path):
    file = save_weights(small(), tmp_path / "a.safetensors")
    message = refused(create_model("resnet20", 5), file)
    assert f"{file} does not fit CifarResNet: 72 of 128 keys are missing (layer1.1.conv1.weight, " in message
    assert message.count("layer") == 3
    assert "unexpected" not in message


def test_another_network_is_summed_up(tmp_path):
    file = save_weights(create_model("wrn_16_2", 5), tmp_path / "a.safetensors")
    message = refused(small(), file)
    # conv1, the last BatchNorm and fc have the same names in both
    assert "48 of 56 keys are missing (layer1.0.conv1.weight, " in message
    assert "keys are unexpected (block1." in message
    assert "have another shape (bn1.weight (128,) for (16,)" in message
    assert message.count(" more)") == 3


def test_other_widths_are_not_taken_for_other_classes(tmp_path):
    file = save_weights(create_model("resnet8x4", 5), tmp_path / "a.safetensors")
    message = refused(create_model("resnet8", 5), file)
    assert "conv1.weight (32, 3, 3, 3) for (16, 3, 3, 3)" in message
    assert "classes" not in message
    # same classes, another embedding: the classifier alone differs, but not in its classes
    one, other = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(4, 2))
    message = refused(other, save_weights(one, tmp_path / "b.safetensors"))
    assert "1 has another shape (0.weight (2, 3) for (2, 4))" in message


def test_metadata_must_be_text(tmp_path):
    with pytest.raises(ACKDError, match=r"metadata 'epochs' for .* is a int"):
        save_weights(small(), tmp_path / "a.safetensors", {"epochs": 3})
    assert list(tmp_path.iterdir()) == []


def test_auxiliary_classifiers_of_a_file_are_left_out_with_a_line(tmp_path, capsys):
    network = create_model("resnet8", 10)
    extra = {"aux1.fc.weight": torch.zeros(2), "AuxLogits.fc.weight": torch.zeros(2)}
    torch.save({**network.state_dict(), **extra}, tmp_path / "a.pth")
    other = create_model("resnet8", 10)
    load_weights(other, tmp_path / "a.pth")
    assert torch.equal(other.fc.weight, network.fc.weight)
    assert "2 tensors of auxiliary classifiers are not read (aux1.fc.weight" in capsys.readouterr().out
    torch.save({**network.state_dict(), "more.weight": torch.zeros(2)}, tmp_path / "b.pth")
    with pytest.raises(ACKDError, match=r"1 of the file's .* unexpected"):
        load_weights(other, tmp_path / "b.pth")


def test_a_file_for_images_of_other_channels_names_them(tmp_path):
    save_weights(create_model("resnet8", 10), tmp_path / "a.safetensors", {})
    with pytest.raises(ACKDError, match=r"its images had 3 channels and grey reads 1, so set data\.channels to 3"):
        load_weights(create_model("resnet8", 10, in_chans=1), tmp_path / "a.safetensors", name="grey")


def test_saving_over_a_folder_or_below_a_file(tmp_path):
    with pytest.raises(ACKDError, match="is a folder; name the weight file"):
        save_weights(small(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ACKDError, match="cannot be written"):
        save_weights(small(), tmp_path / "file" / "a.safetensors")


@pytest.mark.parametrize("failing", ["fsync", "to_safetensors", "replace"])
def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch, failing):
    file = save_weights(small(), tmp_path / "a.safetensors", {"which": "old"})

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif failing == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        monkeypatch.setattr(weights, "to_safetensors", fail)
    with pytest.raises(ACKDError, match="No space left on device"):
        save_weights(small(seed=2), file, {"which": "new"})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    assert read_metadata(file) == {"which": "old"}
    target = small(seed=3)
    load_weights(target, file)
    assert same(target, small())


def test_the_new_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced: list[int] = []
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        assert synced == [self.stat().st_ino]
        assert self.parent == target.parent
        assert load_file(self).keys() == small().state_dict().keys()
        return real(self, target)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(Path, "replace", replace)
    file = save_weights(small(), tmp_path / "a.safetensors")
    assert synced == [file.stat().st_ino]


def test_saved_file_has_ordinary_permissions(tmp_path):
    file = save_weights(small(), tmp_path / "a.safetensors")
    (tmp_path / "ordinary").write_text("")
    assert file.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(
    ("build", "option"),
    [
        (lambda side: create_model("timm:test_vit", 4, img_size=side), "img_size: 160"),
        (lambda side: create_model("timm:deit_tiny_distilled_patch16_224", 4, img_size=side), "img_size: 160"),
        (lambda side: create_model("vit_b_32", 4, image_size=side), "image_size: 160"),
    ],
)
def test_another_image_size_is_recognised(tmp_path, build, option):
    with torch.device("meta"):
        other, own = build(160), build(96)
    with pytest.raises(ACKDError, match=option):
        check_fit(other.state_dict(), own.state_dict(), tmp_path / "a.safetensors", "a network")
