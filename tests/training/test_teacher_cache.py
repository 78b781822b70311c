"""A teacher's logits from disk: the same losses and weights, and no use of a cache of other views."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ackd_lightning import ACKD, KD, ACKDError, DigitsDataModule, TeacherConfig, create_model, save_weights
from ackd_lightning.cli import main
from ackd_lightning.data import Augmentation, ImageFolderDataModule
from ackd_lightning.methods import AT, ATSC, CE, DIST, DKD, NKD, RLD, TTM, Sum
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.runs.claim import claim
from ackd_lightning.training import DOT
from ackd_lightning.training import teacher_cache as cache
from ackd_lightning.types import NetOutput
from training.helpers import build, largest_difference, state, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
EPOCHS = 3
SHARED = ["--config", "digits_resnet20_resnet8.yaml", "--config", "kd.yaml", "--data.seed", "0"]
SHARED += ["--trainer.max_epochs", str(EPOCHS), "--model.lr_scheduler.milestones", "[2]", "--data.max_per_class", "6"]
SHARED += ["--data.batch_size", "16", "--model.teacher.gate", "off", "--model.teacher.network", "resnet8"]
SHARED += ["--model.teacher.weights", "weights/0.safetensors"]
QUIET = ["--trainer.enable_progress_bar", "false", "--weights_dir", "null"]
RUNS = "runs/digits_resnet20_resnet8+kd"


def data(**options: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"seed": 0, "max_per_class": 6, "batch_size": 16, **options})


def module(method=None, *, kept: str | None = None, weights: str = "weights/0.safetensors", **options: Any):
    images = data()
    images.setup()
    teacher = TeacherConfig(network="resnet8", weights=weights, gate="off", cache=kept)
    method = KD() if method is None else method
    return build(method, **{"student": "resnet8", "teacher": teacher, "data": images.info, **options})


def fitted(*arguments: Any, images: dict[str, Any] | None = None, run: dict[str, Any] | None = None, **options: Any):
    """Run a fit and return the module's state and the last loss."""
    net, given = module(*arguments, **options), dict(run or {})
    resume = given.pop("ckpt_path", None)
    fitting = trainer(**{"max_epochs": EPOCHS, "limit_val_batches": 0, **given})
    fitting.fit(net, datamodule=data(**(images or {})), ckpt_path=resume, weights_only=True)
    return {**state(net), "loss": fitting.callback_metrics["train/loss"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a teacher and a cache of its logits."""
    folder, before = tmp_path_factory.mktemp("cache"), Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        for number in (0, 1):
            save_weights(create_model("resnet8", 10), Path(f"weights/{number}.safetensors"), {"model": "resnet8"})
        assert main(["cache", *SHARED, "--out", "kept"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def without(place):
    """Return the end of a fit without a cache."""
    before = Path.cwd()
    os.chdir(place)
    try:
        return fitted()
    finally:
        os.chdir(before)


def test_the_command_fits_with_the_cache_as_without_and_the_teacher_runs_once(monkeypatch):
    assert main(["fit", *SHARED, *QUIET, "--name", "without"]) == 0
    calls = []
    forward = FrozenTeacher.forward
    monkeypatch.setattr(FrozenTeacher, "forward", lambda self, image: calls.append(1) or forward(self, image))
    assert main(["fit", *SHARED, *QUIET, "--name", "with", "--model.teacher.cache", "kept"]) == 0
    assert calls == [1]  # on the first batch, to compare
    first, second = (load_file(f"{RUNS}/{name}/student.safetensors") for name in ("with", "without"))
    assert largest_difference(first, second) == 0.0
    losses = [Path(f"{RUNS}/{name}/metrics.csv").read_text() for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_a_teacher_that_says_something_else_is_refused(tmp_path, monkeypatch):
    """With the same weights: an option, or the code of a network, that no key knows of."""
    forward = FrozenTeacher.forward

    def other(self, image):
        output = forward(self, image)
        return NetOutput(output.logits / 4)

    monkeypatch.setattr(FrozenTeacher, "forward", other)
    with pytest.raises(ACKDError, match=r"teacher\.cache kept does not hold .* of its first batch"):
        fitted(kept="kept")


def test_a_fit_in_python_reads_the_cache_of_the_command(without):
    assert largest_difference(fitted(kept="kept"), without) == 0.0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (KD, {"seed": 1}),
        (DKD, {}),
        (ACKD, {}),
        (DIST, {}),
        (lambda: KD(standardize=True, entropy_temperature=3.0), {}),
        (lambda: TTM(weighted=True), {}),
        (lambda: Sum([NKD(), RLD()]), {}),
        (KD, {"optimizer": functools.partial(DOT, lr=0.05)}),
    ],
    ids=["other seed", "dkd", "ackd", "dist", "weighted kd", "wttm", "sum", "dot"],
)
def test_other_seeds_and_methods_with_the_same_views_share_it(method, options):
    first, second = (fitted(method(), kept=kept, **options) for kept in ("kept", None))
    assert largest_difference(first, second) == 0.0


def test_a_run_in_bfloat16_is_kept_in_bfloat16():
    net, images = module(), data()
    images.setup()
    net.load_teacher()
    assert len(list(cache.fill(Path("half"), net, images, epochs=EPOCHS, precision="bf16-mixed"))) == EPOCHS
    assert load_file("half/epoch-0000.safetensors")["logits"].dtype is torch.bfloat16
    assert load_file("kept/epoch-0000.safetensors")["logits"].dtype is torch.float32
    first, second = (fitted(kept=kept, run={"precision": "bf16-mixed"}) for kept in ("half", None))
    assert largest_difference(first, second) == 0.0


def test_mixed_views_are_kept_and_found(place):
    mixed = {"policy": "trivialaugment", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
    options = [f"--data.augmentation.{name}={value}" for name, value in mixed.items()]
    assert main(["cache", *SHARED, *options, "--out", "mixed"]) == 0
    images = {"augmentation": Augmentation(**mixed)}
    first, second = (fitted(kept=kept, images=images) for kept in ("mixed", None))
    assert largest_difference(first, second) == 0.0
    for other in ({}, {"augmentation": Augmentation(**{**mixed, "mixup": 0.7})}):
        with pytest.raises(ACKDError, match="augmentation"):
            fitted(kept="mixed", images=other)


@pytest.mark.parametrize("devices", ["2", "[0, 1]"])
def test_mixed_images_of_several_processes_have_no_cache(devices, capsys):
    net, plain, mixed = module(), data(), data(augmentation=Augmentation(mixup=0.2))
    net.load_teacher()
    for images in (plain, mixed):
        images.trainer = SimpleNamespace(world_size=2)
        images.setup()
    cache.view_key(net, plain, "32-true")
    with pytest.raises(ACKDError, match=r"2 processes mix others: set trainer\.devices to 1, or mixup and cutmix to 0"):
        cache.view_key(net, mixed, "32-true")
    options = ("--data.augmentation.mixup", "0.2", "--trainer.devices", devices)
    assert main(["cache", *SHARED, *options, "--out", "several"]) == 2
    assert "2 processes mix others" in capsys.readouterr().err
    assert not Path("several").exists()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_continues_with_it(tmp_path, without):
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    fitted(kept="kept", run={"max_epochs": 1, "enable_checkpointing": True, "callbacks": [saver]})
    assert largest_difference(fitted(kept="kept", run={"ckpt_path": tmp_path / "last.ckpt"}), without) == 0.0


def test_an_interrupted_cache_is_completed_and_keeps_its_files(capsys):
    before = Path("kept/epoch-0000.safetensors").stat().st_mtime_ns
    gone = Path("kept/epoch-0001.safetensors")
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(ACKDError, match="lacks epoch 2 of 3"):
        fitted(kept="kept")
    assert main(["cache", *SHARED, "--out", "kept"]) == 0
    assert gone.read_bytes() == content
    assert Path("kept/epoch-0000.safetensors").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert "epoch 2/3" in shown
    assert "epoch 1/3" not in shown


def test_the_option_that_is_named_fits_several_teachers(tmp_path, capsys):
    base = [*SHARED[: SHARED.index("--model.teacher.gate")], "--trainer.max_epochs", "1"]
    teachers = [f"{{network: resnet8, weights: weights/{number}.safetensors, gate: off}}" for number in (0, 1)]
    base += ["--model.teacher", f"[{', '.join(teachers)}]"]
    assert main(["cache", *base, "--out", str(tmp_path / "kept")]) == 0
    option = re.search(r"use it with (\S+) ", capsys.readouterr().out)[1]
    assert option == "--model.teacher.0.cache"
    assert main(["fit", *base, *QUIET, "--name", "two", option, str(tmp_path / "kept")]) == 0
    both = [option, str(tmp_path / "kept"), "--model.teacher.1.cache", "another"]
    assert main(["fit", *base, *QUIET, "--name", "three", *both]) == 2
    assert "and another for another, and a cache has the mean" in capsys.readouterr().err


def test_one_process_fills_a_cache(tmp_path, capsys):
    with claim(tmp_path, "kept", resume=True):
        assert main(["cache", *SHARED, "--out", str(tmp_path / "kept")]) == 2
    assert "another process" in capsys.readouterr().err
    assert not list((tmp_path / "kept").glob("epoch*"))


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    assert main(["cache", *SHARED, "--out", str(tmp_path / "kept")]) == 2
    assert "epoch-0000.safetensors cannot be written (No space left on device); free" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "kept").glob("*epoch*")] == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"images": {"seed": 1}}, "seed of the data '0' .* '1'"),
        ({"images": {"max_per_class": 5}}, "images '60' .* '50'"),
        ({"images": {"batch_size": 8}}, "batch_size '16'"),
        ({"images": {"sampling": "balanced"}}, "balanced"),
        ({"run": {"precision": "bf16-mixed"}}, "precision '32-true' .* 'bf16-mixed'"),
        ({"weights": "weights/1.safetensors"}, "with teacher: weights '"),
        ({"run": {"max_epochs": 4}}, "lacks epoch 4 of 4"),
        ({"run": {"max_epochs": -1, "max_steps": 4}}, "trainer.max_epochs"),
        ({"kept": "nothing"}, "nothing is not a cache"),
        ({"run": {"overfit_batches": 1}}, "trainer.overfit_batches reads them without augmentation"),
        ({"method": AT()}, "method AT"),
        ({"method": ATSC()}, "method ATSC"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_cache_of_other_views_is_refused(options, named):
    given = dict(options)
    with pytest.raises(ACKDError, match=named):
        fitted(given.pop("method", None), **{"kept": "kept", **given})


def test_the_command_refuses_before_anything_is_written(capsys):
    refused = ["fit", *SHARED, *QUIET, "--name", "never", "--model.teacher.cache", "kept", "--data.seed", "1"]
    assert main(refused) == 2
    assert "seed of the data '0'" in capsys.readouterr().err
    assert not list(Path("runs").glob("*/never"))


def test_a_cache_of_another_augmentation_is_refused(monkeypatch):
    monkeypatch.setattr(cache, "_VIEWS", cache._VIEWS + 1)
    with pytest.raises(ACKDError, match=f"views '{cache._VIEWS - 1}' .* '{cache._VIEWS}'"):
        fitted(kept="kept")


def test_a_cache_of_other_images_is_refused(monkeypatch):
    monkeypatch.setattr(DigitsDataModule, "content_mark", lambda self, part: "of other images")
    with pytest.raises(ACKDError, match=r"content of the images .* 'of other images'"):
        fitted(kept="kept")


def test_the_entry_that_differs_is_named(tmp_path):
    key = {"targets": "a", "augmentation": {"policy": "none", "operations": 2, "magnitude": 9, "mixup": 0.0}}
    (tmp_path / "key.json").write_text(json.dumps(key))
    cache.check_key(tmp_path, key)
    with pytest.raises(ACKDError, match=r"made with augmentation\.mixup '0\.0' and this run has '0\.2'"):
        cache.check_key(tmp_path, {**key, "augmentation": {**key["augmentation"], "mixup": 0.2}})
    with pytest.raises(ACKDError, match="made with other training images or classes than this run has"):
        cache.check_key(tmp_path, {**key, "targets": "b"})


@pytest.mark.parametrize(
    ("content", "named"),
    [("{", "cannot be read"), ("[]", "was made with"), ('{"teachers": 1}', "was made with")],
)
def test_a_damaged_key_is_refused(tmp_path, content, named):
    (tmp_path / "key.json").write_text(content)
    with pytest.raises(ACKDError, match=named):
        fitted(kept=str(tmp_path))


def test_a_damaged_epoch_is_named(tmp_path):
    (tmp_path / "key.json").write_text(Path("kept/key.json").read_text())
    for path in Path("kept").glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:100])
    with pytest.raises(ACKDError, match=r"epoch-0000\.safetensors"):
        fitted(kept=str(tmp_path))


def test_a_last_epoch_that_is_cut_off_is_named_before_the_training(tmp_path):
    for path in Path("kept").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-40])
    with pytest.raises(ACKDError, match=rf"{last.name} cannot be read \(.+\); remove it and run `ackd cache` again"):
        cache.TeacherCache(tmp_path, json.loads((tmp_path / "key.json").read_text()), EPOCHS)
    assert main(["cache", *SHARED, "--out", str(tmp_path)]) == 2
    last.unlink()
    assert main(["cache", *SHARED, "--out", str(tmp_path)]) == 0
    save_file({"logits": torch.zeros(7, 10)}, last)
    with pytest.raises(ACKDError, match=r"it holds logits of 7 images and not of 60"):
        cache.TeacherCache(tmp_path, json.loads((tmp_path / "key.json").read_text()), EPOCHS)


def test_the_estimate_names_disk_and_time_and_writes_nothing(capsys):
    before = sorted(Path().rglob("*"))
    assert main(["cache", *SHARED, "--estimate", "--out", "none"]) == 0
    shown = capsys.readouterr().out
    assert f"60 images x {EPOCHS} epochs x 10 classes: 0.0 MB on disk" in shown
    assert sorted(Path().rglob("*")) == before
    assert json.loads(Path("kept/key.json").read_text())["images"] == 60


def test_the_cache_that_the_settings_name_is_written_unless_out_names_another(tmp_path, monkeypatch):
    asked: list[Path] = []
    command = "ackd_lightning.commands.cache"
    monkeypatch.setattr(f"{command}.fill", lambda folder, *arguments, **options: asked.append(folder) or ())
    monkeypatch.setattr(f"{command}.epoch_file", lambda folder, epoch: tmp_path)
    named = ["--model.teacher.cache", str(tmp_path / "named")]
    assert main(["cache", *SHARED, *named]) == main(["cache", *SHARED, *named, "--out", str(tmp_path / "other")]) == 0
    assert main(["cache", *SHARED]) == 0
    assert asked == [tmp_path / "named", tmp_path / "other", Path("teacher-cache")]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--config", "ce.yaml"], "method CE"),
        (["--trainer.precision", "16-mixed"], "16-mixed"),
        (["--trainer.max_epochs", "-1"], "trainer.max_epochs is -1"),
        (["--data.seed", "7", "--out", "kept"], "seed of the data"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_what_cannot_be_cached_is_one_sentence(more, named, capsys):
    assert main(["cache", *SHARED, "--out", "other", *more]) == 2
    assert named in capsys.readouterr().err


def test_a_method_without_a_teacher_has_no_cache():
    net, images = module(CE()), data()
    images.setup()
    with pytest.raises(ACKDError, match="method CE"):
        cache.view_key(net, images, "32-true")


def test_a_cache_of_images_that_are_not_square_is_its_own(tmp_path, monkeypatch):
    for folder in (tmp_path / "photos" / part / label for part in ("train", "test") for label in ("a", "b")):
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (24, 16), (40 * number, 0, 0)).save(folder / f"{number}.png")
    images = ImageFolderDataModule(tmp_path / "photos", image_size=(16, 24), batch_size=4, val_fraction=0, seed=0)
    images.setup()
    net = module(data=images.info)
    monkeypatch.setattr(net.teachers, "key", list)
    key = cache.view_key(net, images, "32-true")
    (tmp_path / cache.KEY_FILE).write_text(json.dumps(key))
    cache.check_key(tmp_path, key)
    assert key["input_size"] == [16, 24]
