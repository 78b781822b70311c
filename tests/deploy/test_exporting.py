"""Every format gives the logits of training, describes itself, and is kept only then."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ackd_lightning import create_model
from ackd_lightning.deploy import checking
from ackd_lightning.deploy.checking import LIMITS, Check, CheckImages, compare, images_of, random_images
from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.exporting import check_free, export, reading_uint8
from ackd_lightning.deploy.files import open_network
from ackd_lightning.deploy.formats.formats import FORMATS, find_format
from ackd_lightning.deploy.formats.program import Opened
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.export import network_of
from ackd_lightning.runs.files import read_checkpoint
from ackd_lightning.types import DataInfo
from deploy.samples import NAMES, checkpoint

SLOW = {"onnx", "pte"}
ALL = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FORMATS]
GRAPHS = ("onnx", "pte", "openvino")
pytestmark = pytest.mark.filterwarnings("ignore")  # of exporters and runtimes, when they are imported


def trained(folder, model="resnet8", **metadata):
    checkpoint(folder / "a.ckpt", model, **metadata)
    network, stated = network_of(read_checkpoint(folder / "a.ckpt"), folder / "a.ckpt")
    return network, Description.from_metadata(stated, "a.ckpt")


def written(folder, name, network, description, **options):
    kind = FORMATS[name]
    if any(find_spec(library) is None for library in kind.libraries):
        pytest.skip(f"needs the extra {kind.extra}")
    images = random_images(description)
    target = folder / f"a{kind.ending}"
    reference = images.logits(network)
    if options.pop("uint8", False):
        network, description = reading_uint8(network, description), description.replace(reads="uint8")
    check = export(network, description, target, kind, images=images, reference=reference, **options)
    return target, check, images, reference


@pytest.mark.parametrize("name", ALL)
def test_a_file_gives_the_logits_of_training_for_any_batch(tmp_path, name):
    network, description = trained(tmp_path, input_size=[16, 24])
    target, check, images, _ = written(tmp_path, name, network, description)
    assert check.difference < 1e-4
    assert check.agreement == 1
    opened = open_network(target)
    assert opened.kind == name
    assert opened.description.names == tuple(NAMES)
    assert opened.description.input_size == (16, 24)
    assert opened.description.mean == description.mean
    assert "64 random images" in opened.description.checked
    pixels = next(iter(images))
    for count in (1, 3, 40):
        with torch.no_grad():
            assert torch.allclose(opened.logits(pixels[:count]), network(pixels[:count]), atol=1e-4)
    assert sorted(each.suffix for each in tmp_path.iterdir()) == sorted(
        [".ckpt", target.suffix, *([".bin"] if name == "openvino" else [])]
    )


class Halves(nn.Module):
    """A part of a ShuffleNet, for which ExecuTorch fixes the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 2, 1), nn.Linear(4, 5)

    def forward(self, images):
        one, two = self.first(images).chunk(2, dim=1)
        maps = torch.cat((one, self.second(two).relu()), dim=1)
        one, two = maps.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2).chunk(2, dim=1)
        return self.head(torch.cat((one, self.second(two)), dim=1).mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet8", "halves"])
def test_a_program_for_phones_takes_one_image_and_as_many_as_it_states(tmp_path, kind):
    runtime = pytest.importorskip("executorch.runtime")
    network = (Halves() if kind == "halves" else create_model(kind, 5)).eval()
    FORMATS["pte"].write(network, torch.randn(2, 3, 16, 16), tmp_path / "a.pte", {"model": kind})
    metadata = FORMATS["pte"].open_file(tmp_path / "a.pte").metadata
    assert (metadata["model"], metadata["batch"]) == (kind, "1" if kind == "halves" else "32")
    forward = runtime.Runtime.get().load_program(tmp_path / "a.pte").load_method("forward")
    for count in {1, int(metadata["batch"])}:
        images = torch.randn(count, 3, 16, 16)
        with torch.no_grad():
            assert torch.allclose(forward.execute([images])[0], network(images), atol=1e-4)


def test_a_graph_of_openvino_takes_images_of_its_size_alone(tmp_path):
    network, description = trained(tmp_path)
    opened = open_network(written(tmp_path, "openvino", network, description)[0])
    height, width = opened.description.image_shape[1:]
    for shape in ((2, 3, height + 4, width), (2, 1, height, width)):
        with pytest.raises(RuntimeError):
            opened.run(torch.zeros(shape))


@pytest.mark.parametrize(
    "name", ["pt2", *(pytest.param(each, marks=pytest.mark.slow) for each in ("onnx", "pte", "openvino"))]
)
def test_preprocessing_in_the_graph_reads_uint8(tmp_path, name):
    plain = {"channels": 1, "crop_pct": 1.0, "interpolation": "bilinear"}
    network, description = trained(tmp_path, mean=[0.3], std=[0.2], preprocessing=plain)
    target, check, *_ = written(tmp_path, name, network, description, uint8=True)
    assert check.difference < 1e-4
    opened = open_network(target)
    assert opened.description.reads == "uint8"
    raw = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = network((raw / 255 - 0.3) / 0.2)
    assert torch.allclose(opened.run(raw), expected, atol=1e-4)
    assert torch.allclose(opened.predict(raw).probabilities, expected.softmax(1), atol=1e-4)


@pytest.mark.slow
def test_networks_of_timm_are_exported(tmp_path):
    network, description = trained(tmp_path, "timm:test_byobnet", input_size=32)
    _, check, *_ = written(tmp_path, "pt2", network, description)
    assert check.difference < 1e-4


@pytest.mark.parametrize(("dtype", "share"), [("float16", 0.6), ("bfloat16", 0.6)])
def test_half_of_the_bits(tmp_path, dtype, share):
    network, description = trained(tmp_path)
    full, *_ = written(tmp_path, "safetensors", network, description)
    size = full.stat().st_size
    half, check, *_ = written(tmp_path, "safetensors", network, description.replace(dtype=dtype), overwrite=True)
    assert half.stat().st_size < share * size
    assert check.difference > 0
    types = {key: value.dtype for key, value in load_file(half).items()}
    assert types["conv1.weight"] == getattr(torch, dtype)
    assert types["bn1.weight"] == types["bn1.running_var"] == torch.float32
    opened = open_network(half)
    assert opened.description.dtype == dtype
    assert next(opened.network.parameters()).dtype == torch.float32


def test_a_file_that_takes_no_single_image_is_not_kept(tmp_path, monkeypatch):
    network, description = trained(tmp_path)

    def pairs(images):
        if len(images) < 2:
            raise RuntimeError("Attempted to resize a static tensor")
        return network(images)

    changed = replace(FORMATS["safetensors"], open_file=lambda path: Opened(pairs, {}))
    monkeypatch.setitem(FORMATS, "safetensors", changed)
    with torch.no_grad(), pytest.raises(ACKDError, match=r"cannot run it .*static tensor"):
        written(tmp_path, "safetensors", network, description)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_file_that_its_runtime_cannot_run_is_not_kept(tmp_path, monkeypatch):
    network, description = trained(tmp_path)

    def fails(images):
        raise RuntimeError("method->execute() failed with error 0x12")

    monkeypatch.setitem(
        FORMATS, "safetensors", replace(FORMATS["safetensors"], open_file=lambda path: Opened(fails, {}))
    )
    with pytest.raises(ACKDError, match=r"cannot run it .*0x12"):
        written(tmp_path, "safetensors", network, description)
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_weights_beyond_half_precision_are_not_kept(tmp_path):
    network, description = trained(tmp_path)
    network.fc.weight.data.mul_(1e6)
    with pytest.raises(ACKDError, match="not finite"):
        written(tmp_path, "safetensors", network, description.replace(dtype="float16"))
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_file_with_other_logits_leaves_the_old_one(tmp_path, monkeypatch):
    network, description = trained(tmp_path)
    target = tmp_path / "a.pt2"
    target.write_text("old")
    monkeypatch.setattr(checking.CheckImages, "logits", _shifted(checking.CheckImages.logits))
    with pytest.raises(ACKDError, match=r"a\.pt2"):
        written(tmp_path, "pt2", network, description, overwrite=True)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def _shifted(logits):
    count = iter(range(10))
    return lambda self, run: logits(self, run) + next(count)


@pytest.mark.parametrize(
    ("check", "limits", "word"),
    [
        (Check(0.0, 1.0, 1.0, 0.9, 0.9), "float32", None),
        (Check(0.01, 1.0, 1.0, 0.9, 0.9), "float32", "0.01"),
        (Check(0.01, 100.0, 1.0, 0.9, 0.9), "float32", None),
        (Check(0.01, 1.0, 1.0, 0.9, 0.9), "float16", None),
        (Check(0.0, 1.0, 0.9, None, None), "float32", "90.00%"),
        (Check(0.0, 1.0, 1.0, 0.9, 0.8), "float32", "80.00%"),
        (Check(9.0, 1.0, 0.95, 0.9, 0.88), "int8", None),
        (Check(9.0, 1.0, 0.75, 0.9, 0.88), "int8", "75.00%"),
        (Check(float("inf"), 1.0, 1.0, 0.9, 0.9), "int8", "finite"),
    ],
)
def test_limits(check, limits, word):
    images = CheckImages(
        [], lambda each: each, part="val", counted=40, words="40 validation and 472 training images of Data"
    )
    problem = check.problem(LIMITS[limits], images)
    assert problem is None if word is None else word in problem
    if problem is not None and "accuracy" in problem:
        assert problem.endswith("on 40 validation images")  # those that it was measured on


class OwnData:
    """Data of another project, with 24 normalised images that were never 8 bits, in batches of any form."""

    info = DataInfo(4, 16, mean=(0.5,) * 3, std=(0.25,) * 3)

    def __init__(self, form):
        self.form = form

    def val_dataloader(self):
        image = (torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5) / 0.25
        target = torch.arange(24) % 4
        if self.form == "mapping":
            return [{"image": image, "label": target}]
        return [(image, {"column": target[:, None], "one-hot": torch.eye(4)[target]}.get(self.form, target))]

    def on_after_batch_transfer(self, batch, _):
        return batch


@pytest.mark.parametrize("form", ["pair", "mapping", "column", "one-hot"])
def test_a_file_is_compared_on_batches_of_every_form_that_trains(form):
    images = images_of(OwnData(form))
    assert images.targets.tolist() == [number % 4 for number in range(24)]
    assert images.accuracy(torch.eye(4)[images.targets]) == 1


def test_preprocessing_is_not_put_into_a_network_whose_pixels_have_a_range_of_their_own(tmp_path):
    network, description = trained(tmp_path)
    ranged = description.replace(value_range=(0.0, 40.0))
    with pytest.raises(ACKDError, match="value_range 0 to 40"):
        reading_uint8(network, ranged)
    assert "pixels from 0 to 40 become 0 to 1" in "\n".join(ranged.lines())


def test_a_network_with_preprocessing_is_compared_on_what_it_can_read(tmp_path):
    network, description = trained(tmp_path, input_size=[16, 16])
    description = description.replace(mean=(0.5,) * 3, std=(0.25,) * 3)
    images = images_of(OwnData("pair")).as_uint8(Preprocessing(description))
    assert images.words == "24 validation images of OwnData, rounded to 8 bits"
    check = export(
        reading_uint8(network, description),
        description.replace(reads="uint8"),
        tmp_path / "a.pt2",
        FORMATS["pt2"],
        images=images,
        reference=images.logits(network),
    )
    assert check.difference < 1e-4
    assert images.as_uint8(Preprocessing(description)) is images


def test_non_finite_logits_count_as_different():
    description = Description("resnet8", 2, 8, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = random_images(description)
    check = compare(images, torch.zeros(64, 2), lambda pixels: torch.full((len(pixels), 2), float("nan")))
    assert check.difference == float("inf")


class Branching(nn.Module):
    """Network whose forward depends on the values of the image."""

    def forward(self, image: Tensor) -> Tensor:
        if image.mean() > 0:
            return image.mean(dim=(2, 3))
        return image.amax(dim=(2, 3))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, image: Tensor) -> Tensor:
        return self.inner(image)


class Ranked(nn.Module):
    """Network with an operator that some formats do not have."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(image @ image.mT).sum(dim=2)


@pytest.mark.parametrize(
    ("name", "network", "words"),
    [
        ("pt2", Outer(), "inner"),
        ("pt2", Branching(), "Branching"),
        pytest.param("onnx", Ranked(), "linalg_eigh", marks=pytest.mark.slow),
        ("openvino", Ranked(), "linalg_eigh"),
    ],
)
def test_what_an_exporter_refuses_is_named(tmp_path, name, network, words):
    description = Description("own", 3, 16, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(ACKDError, match=words) as caught:
        written(tmp_path, name, network, description)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if kind.extra])
def test_a_missing_library_is_one_sentence_with_the_command(tmp_path, monkeypatch, name):
    network, description = trained(tmp_path)
    kind = FORMATS[name]
    monkeypatch.setitem(sys.modules, kind.libraries[-1], None)
    images = random_images(description)
    with pytest.raises(ACKDError, match=rf"{kind.libraries[-1]}.*ackd-lightning\[{kind.extra}\]"):
        export(network, description, tmp_path / "a", kind, images=images, reference=images.logits(network))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    network, description = trained(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(ACKDError, match="MB free"):
        written(tmp_path, "pt2", network, description)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ackd_lightning.deploy.formats.safetensors.save_weights", full)
    with pytest.raises(ACKDError, match="No space left"):
        written(tmp_path, "safetensors", network, description)
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".pte", ".xml"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a program", b"<xml/>"], ids=["empty", "zip", "xml"])
def test_a_damaged_file_is_named(tmp_path, ending, content, monkeypatch):
    file = tmp_path / f"odd{ending}"
    file.write_bytes(content)
    with pytest.raises(ACKDError, match="odd"):
        open_network(file)


def test_a_graph_of_another_program_is_refused(tmp_path):
    network, _ = trained(tmp_path)
    graph = torch.export.export(network, (torch.zeros(2, 3, 16, 16),))
    torch.export.save(graph, tmp_path / "plain.pt2")
    with pytest.raises(ACKDError, match=r"plain\.pt2 has no description"):
        open_network(tmp_path / "plain.pt2")


@pytest.mark.parametrize(("name", "hint"), [("onxx", "onnx"), ("tflite", "known are")])
def test_an_unknown_format(name, hint):
    with pytest.raises(ACKDError, match=hint):
        find_format(name)


def test_what_lies_beside_a_file_is_not_replaced(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"theirs")
    with pytest.raises(ACKDError, match=r"a\.bin exists"):
        check_free(FORMATS["openvino"], tmp_path / "a.xml", overwrite=False)
    check_free(FORMATS["onnx"], tmp_path / "a.onnx", overwrite=False)


def test_a_torch_that_writes_other_files_is_refused(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.8.0+cpu")
    with pytest.raises(ACKDError, match=r"format pt2 needs torch 2\.9 or newer and this is 2\.8\.0\+cpu"):
        FORMATS["pt2"].check_libraries()
    FORMATS["safetensors"].check_libraries()
    monkeypatch.setattr("torch.__version__", "2.9.0a0+nv25.08")  # a build of 2.9
    FORMATS["pt2"].check_libraries()


class Counting(nn.Module):
    """Network that flattens its images by the number of them, which one kind of tracing takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(3 * 16 * 16, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(image.reshape(len(image), -1))


@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_a_network_that_counts_its_images_keeps_a_free_batch(tmp_path, name):
    description = Description("own", 3, 16, mean=(0.5,) * 3, std=(0.5,) * 3)
    network = Counting().eval()
    target, *_ = written(tmp_path, name, network, description)
    for count in (1, 7):
        images = torch.randn(count, 3, 16, 16)
        assert torch.allclose(open_network(target).run(images), network(images), atol=1e-5)
