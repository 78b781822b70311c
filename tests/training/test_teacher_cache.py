"""A teacher's logits from disk: the same losses and weights, and no use of what was made for something else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ackd_lightning import create_model, save_weights
from ackd_lightning.cli import main
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.training import teacher_cache as cache

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*``instantiate_classes`` was deprecated")
EPOCHS = 3
SHARED = ["--config", "digits_resnet20_resnet8.yaml", "--config", "kd.yaml", "--data.seed", "0"]
SHARED += ["--trainer.max_epochs", str(EPOCHS), "--model.milestones", "[2]", "--data.max_per_class", "6"]
SHARED += ["--data.batch_size", "16", "--model.teacher_gate", "off"]
QUIET = ["--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a teacher and a cache of its logits."""
    folder, before = tmp_path_factory.mktemp("cache"), Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        for number in (0, 1):
            path = Path(f"weights/{number}.safetensors")
            save_weights(create_model("resnet20", 10), path, {"model": "resnet20"})
        Path("weights/0.safetensors").rename("weights/digits_resnet20.safetensors")
        assert main(["cache", *SHARED, "--out", "kept"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def fit(name: str, *more: str) -> int:
    return main(["fit", *SHARED, *QUIET, "--name", name, *more])


def weights(name: str, config: str = "digits_resnet20_resnet8+kd") -> dict[str, torch.Tensor]:
    return load_file(Path("runs") / config / name / "student.safetensors")


def largest(first, second):
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


def test_a_run_with_the_cache_is_the_run_without_and_the_teacher_rests(monkeypatch):
    assert fit("without") == 0
    calls = []
    forward = FrozenTeacher.forward
    monkeypatch.setattr(FrozenTeacher, "forward", lambda self, image: calls.append(1) or forward(self, image))
    assert fit("with", "--model.teacher_cache", "kept") == 0
    assert calls == []
    assert largest(weights("with"), weights("without")) == 0.0
    losses = [Path(f"runs/digits_resnet20_resnet8+kd/{name}/metrics.csv").read_text() for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_other_seeds_and_methods_that_see_the_same_views_share_it():
    assert fit("seed1", "--model.teacher_cache", "kept", "--seed_everything", "1") == 0
    assert fit("seed1_without", "--seed_everything", "1") == 0
    assert largest(weights("seed1"), weights("seed1_without")) == 0.0
    for method in ("dkd", "ackd"):
        assert fit("a", "--config", f"{method}.yaml", "--model.teacher_cache", "kept") == 0


def test_a_run_in_bfloat16_is_kept_in_bfloat16():
    half = ["--trainer.precision", "bf16-mixed"]
    assert main(["cache", *SHARED, *half, "--out", "half"]) == 0
    assert load_file("half/epoch-0000.safetensors")["logits"].dtype is torch.bfloat16
    assert load_file("kept/epoch-0000.safetensors")["logits"].dtype is torch.float32
    assert fit("half_with", *half, "--model.teacher_cache", "half") == 0
    assert fit("half_without", *half) == 0
    assert largest(weights("half_with"), weights("half_without")) == 0.0


def test_a_resumed_run_goes_on_with_it():
    assert fit("stopped", "--model.teacher_cache", "kept", "--trainer.max_epochs", "1") == 0
    last = "runs/digits_resnet20_resnet8+kd/stopped/checkpoints/last.ckpt"
    Path("runs/digits_resnet20_resnet8+kd/stopped/summary.json").unlink()
    assert fit("stopped", "--model.teacher_cache", "kept", "--ckpt_path", last) == 0
    assert fit("whole") == 0
    assert largest(weights("stopped"), weights("whole")) == 0.0


def test_an_interrupted_cache_is_finished_without_doing_again_what_is_there(capsys):
    before = Path("kept/epoch-0000.safetensors").stat().st_mtime_ns
    gone = Path("kept/epoch-0001.safetensors")
    there = gone.read_bytes()
    gone.unlink()
    assert fit("lacking", "--model.teacher_cache", "kept") == 2
    assert "lacks epoch 2 of 3" in capsys.readouterr().err
    assert main(["cache", *SHARED, "--out", "kept"]) == 0
    assert gone.read_bytes() == there
    assert Path("kept/epoch-0000.safetensors").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert "epoch 2/3" in shown
    assert "epoch 1/3" not in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.seed", "1"], "seed of the data '0' and this run has '1'"),
        (["--data.max_per_class", "5"], "images '60' and this run has '50'"),
        (["--trainer.precision", "bf16-mixed"], "precision '32-true' and this run has 'bf16-mixed'"),
        (["--data.batch_size", "8"], "batch_size '16'"),
        (["--model.teacher_weights", "weights/1.safetensors"], "was made with teacher '"),
        (["--trainer.max_epochs", "4"], "lacks epoch 4 of 4"),
        (["--model.teacher_cache", "nothing"], "nothing is no cache"),
        (["--config", "at.yaml"], "method AT does not learn from a teacher's logits alone"),
        (["--config", "simkd.yaml"], "method ATSC does not learn from a teacher's logits alone"),
    ],
)
def test_a_cache_of_something_else_is_refused_before_anything_is_written(more, words, capsys):
    assert fit("never", "--model.teacher_cache", "kept", *more) == 2
    assert words in capsys.readouterr().err
    assert not list(Path("runs").glob("*/never"))


def test_a_cache_of_views_that_are_drawn_otherwise_now_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(cache, "_VIEWS", cache._VIEWS + 1)
    assert fit("never", "--model.teacher_cache", "kept") == 2
    assert f"views '{cache._VIEWS - 1}' and this run has '{cache._VIEWS}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "cannot be read"), ("[]", "was made with"), ('{"teacher": 1}', "was made with teacher '1'")],
)
def test_a_damaged_key_is_refused(tmp_path, content, words, capsys):
    (tmp_path / "key.json").write_text(content)
    assert fit("never", "--model.teacher_cache", str(tmp_path)) == 2
    assert words in capsys.readouterr().err


def test_a_damaged_epoch_is_named(tmp_path, capsys):
    (tmp_path / "key.json").write_text(Path("kept/key.json").read_text())
    for path in Path("kept").glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:100])
    assert fit("damaged", "--model.teacher_cache", str(tmp_path)) == 2
    assert "epoch-0000.safetensors cannot be read" in capsys.readouterr().err


def test_the_estimate_names_disk_and_time_and_writes_nothing(capsys):
    before = sorted(Path().rglob("*"))
    assert main(["cache", *SHARED, "--estimate", "--out", "none"]) == 0
    shown = capsys.readouterr().out
    assert f"60 images x {EPOCHS} epochs x 10 classes: 0.0 MB on disk" in shown
    assert sorted(Path().rglob("*")) == before
    assert json.loads(Path("kept/key.json").read_text())["images"] == 60


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--config", "ce.yaml"], "method CE has no teacher"),
        (["--trainer.precision", "16-mixed"], "trainer.precision is 16-mixed"),
        (["--trainer.max_epochs", "-1"], "trainer.max_epochs is -1"),
        (["--data.seed", "7", "--out", "kept"], "kept was made with seed of the data"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_what_cannot_be_cached_is_one_sentence(more, words, capsys):
    assert main(["cache", *SHARED, "--out", "other", *more]) == 2
    assert words in capsys.readouterr().err
