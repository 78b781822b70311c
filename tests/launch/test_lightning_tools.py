"""Finders, profilers, progress bars, loggers and schedules of Lightning and torch in a run of the command line."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml

from ackd_lightning.cli import main
from ackd_lightning.data import DigitsDataModule
from ackd_lightning.runs import files

QUICK = ["--weights_dir", "null", "--trainer.max_epochs", "1", "--data.max_per_class", "6", "--data.batch_size", "20"]
QUICK += ["--trainer.limit_val_batches", "1", "--name", "a"]
RUN = Path("runs/digits_resnet8/a")
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's tools


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(*options, config="digits_resnet8"):
    return main(["fit", "--config", config, *QUICK, *options])


def summary():
    return json.loads((RUN / "summary.json").read_text())


@pytest.mark.parametrize(
    "tool",
    [
        ["--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps=25", "--data.batch_size=2"],
        ["--trainer.callbacks+=BatchSizeFinder", "--trainer.callbacks.max_trials=1"],
    ],
    ids=["rate", "batch"],
)
def test_what_a_finder_found_is_in_the_files_of_the_run(tool):
    begin = time.monotonic()
    assert fit(*tool) == 0
    assert summary()["seconds"] <= time.monotonic() - begin
    settings = yaml.safe_load((RUN / "config.yaml").read_text())
    checkpoint = torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)
    used = checkpoint["optimizer_states"][0]["param_groups"][0]["lr"]
    assert settings["model"]["optimizer"]["init_args"]["lr"] == pytest.approx(used)
    assert checkpoint["hyper_parameters"]["optimizer"]["init_args"]["lr"] == pytest.approx(used)
    found = settings["data"]["init_args"]["batch_size"] if "Batch" in tool[0] else used
    assert found not in (20, 0.05)
    assert checkpoint["global_step"] == 60 // settings["data"]["init_args"]["batch_size"]


@pytest.mark.parametrize(
    "option",
    [
        ["--trainer.profiler", "simple"],
        ["--trainer.profiler", "pytorch"],
        ["--trainer.callbacks+=TQDMProgressBar"],
        ["--trainer.callbacks+=RichProgressBar"],
        ["--trainer.callbacks+=RichModelSummary"],
        ["--trainer.callbacks+=ModelSummary"],
        ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "elsewhere"],
        ["--model.lr_scheduler", "ReduceLROnPlateau"],
        ["--model.lr_scheduler", "ReduceLROnPlateau", "--trainer.check_val_every_n_epoch=2", "--trainer.max_epochs=2"],
        ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "1"],
        ["--model.optimizer", "timm.optim.Lamb"],
        ["--model.optimizer", "timm.optim.Lion", "--model.optimizer.lr", "1e-3"],
        ["--model.optimizer", "NAdam"],
        ["--trainer.accumulate_grad_batches", "2"],
    ],
    ids=" ".join,
)
def test_a_run_with_it_ends_with_a_summary_and_a_student(option):
    assert fit(*option) == 0
    assert summary()["epochs"] == (2 if "--trainer.max_epochs=2" in option else 1)
    assert (RUN / "student.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--trainer.logger", "MLFlowLogger"], "mlflow"),
        (["--trainer.logger", "CometLogger"], "comet"),
        (["--model.lr_scheduler", "ReduceLROnPlateau", "--model.recipe.interval", "step"], "interval"),
        (["--model.lr_scheduler", "ReduceLROnPlateau", "--data.val_fraction", "0"], "val_fraction"),
        (["--model.lr_scheduler", "ReduceLROnPlateau", "--trainer.limit_val_batches", "0"], "validation"),
        (["--model.recipe.early_stopping", "3", "--data.val_fraction", "0"], "early_stopping is 3"),
        (["--model.recipe.early_stopping", "3", "--trainer.limit_val_batches", "0"], "early_stopping is 3"),
        (["--model.optimizer", "timm.optim.Lookahead"], "Lookahead"),
        (["--model.lr_scheduler", "timm.scheduler.CosineLRScheduler"], "CosineLRScheduler"),
        (["--model.recipe.class_weights", "[1, 2]"], "class_weights"),
        (["--data.augmentation.policy", "randaug"], "randaug"),
        (["--data.augmentation.mixup", "0.2", "--config", "acn.yaml"], "mixup 0.2"),
        (["--data.sampling", "balanced", "--config", "pskd.yaml"], "AIKD"),
        (["--trainer.val_check_interval", "1000"], "val_check_interval"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_work_is_one_sentence_before_the_first_step(options, named, capsys):
    assert fit(*options) == 2 or named in ("mlflow", "comet")
    said = capsys.readouterr().err.strip().splitlines()
    assert named in said[-1]
    assert not list(Path("runs").rglob("*.*"))


def test_accumulation_with_auxiliary_optimizers_is_refused(capsys):
    assert fit("--trainer.accumulate_grad_batches", "2", "--config", "acn.yaml") == 2
    assert "accumulate_grad_batches is 2" in capsys.readouterr().err


def test_a_callback_that_fails_after_the_last_epoch_loses_nothing(monkeypatch, capsys):
    class Failing(L.Callback):
        def on_train_end(self, *_):
            raise RuntimeError("the end")

    import ackd_lightning.launch.trainer as launched

    usual = launched._callbacks
    monkeypatch.setattr(launched, "_callbacks", lambda *each: [Failing(), *usual(*each)])
    assert fit() == 1
    assert "the end" in capsys.readouterr().err
    assert summary()["epochs"] == 1
    assert (RUN / "student.safetensors").is_file()


def test_a_student_with_infinite_logits_is_said_and_the_summary_kept(monkeypatch):
    """Weights are finite, and what they compute is not."""

    class Spoil(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            for parameter in pl_module.student.parameters():
                parameter.data.fill_(1e30)

    import ackd_lightning.launch.trainer as launched

    usual = launched._callbacks
    monkeypatch.setattr(launched, "_callbacks", lambda *each: [Spoil(), *usual(*each)])
    with pytest.warns(UserWarning, match="not finite"):
        warned = fit()
    assert warned == 0
    assert summary()["epochs"] == 1
    assert not (RUN / "student.safetensors").exists()


@pytest.mark.parametrize("stream", [None, "closed"])
@pytest.mark.parametrize("command", ["fit", "configs"])
def test_a_program_without_a_console(stream, command, monkeypatch):
    closed = io.StringIO()
    closed.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, closed if stream else None)
    code = fit() if command == "fit" else main(["configs"])
    assert code == 0
    assert command == "configs" or summary()["epochs"] == 1


class TwoLoaders(DigitsDataModule):
    def val_dataloader(self):
        return [super().val_dataloader(), super().test_dataloader()]


def test_two_validation_loaders(monkeypatch):
    monkeypatch.setitem(sys.modules, "two_loaders", sys.modules[__name__])
    assert fit("--data", "two_loaders.TwoLoaders") == 0
    last = summary()["last"]
    assert {"val/acc", "val2/acc", "val2/loss"} <= last.keys()


def test_the_id_of_a_wandb_run_is_kept(tmp_path):
    from ackd_lightning.callbacks.wandb import run_id

    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first
    assert run_id(tmp_path / "b") != first
    (tmp_path / "a" / "config.yaml").write_text(f"{files.STARTED}{tmp_path}\n{files.RUN}{tmp_path / 'a'}\nname: a\n")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert (run_id(tmp_path / "a"), run_id(tmp_path / "copy") == first) == (first, False)
    (tmp_path / "a").rename(tmp_path / "moved")
    assert run_id(tmp_path / "moved") == first


def test_a_trial_of_a_sweep_keeps_the_id_that_the_agent_gave_it(tmp_path, monkeypatch):
    from ackd_lightning.callbacks.wandb import run_id

    monkeypatch.setenv("WANDB_RUN_ID", "9f8e7d6c")
    assert run_id(tmp_path / "alone") != "9f8e7d6c"
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    assert run_id(tmp_path / "trial") == "9f8e7d6c"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert run_id(tmp_path / "trial") == "9f8e7d6c"


def test_a_training_goes_on_when_the_reader_of_its_output_leaves(tmp_path):
    options = ["--config", "digits_resnet8", "--name", "a", "--trainer.max_epochs", "2", "--data.max_per_class", "8"]
    command = [sys.executable, "-m", "ackd_lightning", "fit", *options, "--trainer.accelerator", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()  # as head does
    assert process.wait(60) == 0
    assert (tmp_path / "runs/digits_resnet8/a/summary.json").is_file()
