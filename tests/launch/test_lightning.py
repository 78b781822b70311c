"""What settings become: classes of the command line over those of files, automatic values, what is written."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from ackd_lightning import DistillationModule
from ackd_lightning.callbacks.summary import RunSummary
from ackd_lightning.cli import main
from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import Execution, plan
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.methods.description import describe
from ackd_lightning.training import DOT
from ackd_lightning.training.factories import describe_factory

PAIR = ["--config", "digits_resnet20_resnet8"]
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
COSINE = ["--model.lr_scheduler", "CosineAnnealingLR"]


def model(*arguments: str) -> dict:
    return ACKDCLI("fit", [*PAIR, *arguments]).settings()["model"]


def init_args(spec: dict) -> dict:
    return spec["init_args"]


def test_settings_come_from_files_and_recipe_with_options_on_top():
    settings = model("--model.optimizer.lr", "0.3", "--model.recipe.warmup_epochs", "5", "--model.teacher.gate", "off")
    assert SGD.items() - {("lr", 0.05)} <= init_args(settings["optimizer"]).items()
    assert init_args(settings["optimizer"])["lr"] == 0.3
    assert init_args(settings["lr_scheduler"])["milestones"] == [30, 48]
    assert (settings["recipe"]["warmup_epochs"], settings["recipe"]["interval"]) == (5, "epoch")
    assert (settings["teacher"]["gate"], settings["teacher"]["network"]) == ("off", "resnet20")


@pytest.mark.parametrize(
    "options",
    [
        ["--model.optimizer", "AdamW"],
        ["--model.optimizer=torch.optim.AdamW"],
        ["--model.optimizer.class_path", "torch.optim.AdamW"],
        ["--model.optimizer", '{"class_path": "torch.optim.AdamW"}'],
        ["--model.optimizer.eps", "1e-8", "--model.optimizer", "AdamW"],
    ],
    ids=" ".join,
)
def test_another_class_on_the_command_line_drops_the_arguments_of_the_files(options):
    arguments = init_args(model(*options)["optimizer"])
    defaults = inspect.signature(torch.optim.AdamW).parameters
    assert (arguments["lr"], arguments["weight_decay"]) == (defaults["lr"].default, defaults["weight_decay"].default)


def test_the_same_class_on_the_command_line_keeps_them():
    assert SGD.items() <= init_args(model("--model.optimizer", "torch.optim.SGD")["optimizer"]).items()


def test_another_method_on_the_command_line_drops_the_arguments_of_the_files(tmp_path):
    (tmp_path / "hot.yaml").write_text("model: {method: {init_args: {temperature: 9}}}")
    hot = ["--config", str(tmp_path / "hot.yaml")]
    assert init_args(model(*hot)["method"])["temperature"] == 9
    assert init_args(model(*hot, "--model.method", "ackd_lightning.methods.KD")["method"])["temperature"] == 4


def test_the_recipe_of_the_command_line_is_the_one_in_python():
    """The defaults of DistillationModule are written again as a fragment, which files and options are laid over."""
    parameters = inspect.signature(DistillationModule).parameters
    optimizer = parameters["optimizer"].default([nn.Parameter(torch.zeros(1))])
    scheduler = parameters["lr_scheduler"].default(optimizer)
    recipe = read_config(config_folder() / "recipes" / "sgd.yaml")["model"]
    assert recipe["optimizer"]["class_path"] == f"torch.optim.{type(optimizer).__name__}"
    assert recipe["optimizer"]["init_args"].items() <= optimizer.defaults.items()
    assert recipe["lr_scheduler"]["class_path"].rpartition(".")[2] == type(scheduler).__name__
    milestones = sorted(scheduler.milestones)
    assert recipe["lr_scheduler"]["init_args"] == {"milestones": milestones, "gamma": scheduler.gamma}


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        (COSINE, "T_max", 60),
        ([*COSINE, "--trainer.max_epochs", "7"], "T_max", 7),
        ([*COSINE, "--model.lr_scheduler.T_max", "9"], "T_max", 9),
        ([*COSINE, "--model.recipe.interval", "step"], "T_max", 0),  # resolved when the steps of an epoch are known
        ([*COSINE, "--trainer.max_steps", "9", "--trainer.max_epochs", "null"], "T_max", 0),  # likewise
        (["--config", "recipes/adamw"], "T_max", 60),
        (["--model.lr_scheduler", "PolynomialLR"], "total_iters", 60),
        (["--model.lr_scheduler", "PolynomialLR", "--model.lr_scheduler.total_iters", "5"], "total_iters", 5),
        (["--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "0.1"], "total_steps", 60),
    ],
)
def test_the_length_of_a_schedule_is_that_of_the_fit_unless_stated(options, name, expected):
    assert init_args(model(*options)["lr_scheduler"])[name] == expected


def test_a_schedule_without_a_known_length_is_refused():
    with pytest.raises(ACKDError, match="T_max"):
        ACKDCLI("fit", [*PAIR, *COSINE, "--trainer.max_epochs", "-1"])


def test_print_config_shows_what_automatic_values_become(capsys):
    assert main(["fit", "--config", "cifar100_resnet110_resnet20.yaml", *COSINE, "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert init_args(settings["model"]["method"])["branches"] == ["D3B1", "D2B2"]
    assert init_args(settings["model"]["lr_scheduler"])["T_max"] == 200
    assert settings["trainer"]["max_epochs"] == 200


def test_printed_settings_are_a_configuration(capsys, tmp_path):
    assert main(["fit", *PAIR, "--print_config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    again = ACKDCLI("fit", ["--config", str(path)])
    assert again.settings() == ACKDCLI("fit", PAIR).settings()
    assert again.config_name == "printed"


def test_short_options_are_kept_at_the_settings_that_they_stand_for(monkeypatch):
    fast = {"model.channels_last": True, "model.compile": True, "trainer.precision": "bf16-mixed"}
    monkeypatch.setattr("ackd_lightning.launch.options.fast_settings", lambda accelerator: fast)
    short = ["--fast", "--on_nonfinite", "skip", "--trainer.precision", "64-true"]
    settings = ACKDCLI("fit", [*PAIR, *short]).settings()
    assert (settings["model"]["on_nonfinite"], settings["on_nonfinite"]) == ("skip", None)
    assert (settings["model"]["channels_last"], settings["model"]["compile"], settings["fast"]) == (True, True, False)
    assert settings["trainer"]["precision"] == "64-true"  # a stated value stays
    model = ACKDCLI("fit", [*PAIR, "--fast", "--model.compile=false"]).settings()["model"]
    assert (model["channels_last"], model["compile"]) == (True, False)


def test_a_plan_builds_networks_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = plan([*PAIR, "--name", "x", *COSINE])
    assert planned.model.student.specs == ("D3B1", "D2B2")
    assert planned.model.data.num_classes == planned.datamodule.num_classes == 10
    assert planned.option("trainer.max_epochs") == 60
    assert planned.folder == Path("runs/digits_resnet20_resnet8/x")
    assert planned.settings()["model"]["student"]["network"] == "resnet8"
    hparams = planned.model.hparams
    assert hparams["optimizer"]["class_path"] == "torch.optim.SGD"
    assert hparams["lr_scheduler"]["init_args"]["T_max"] == 60
    assert list(tmp_path.iterdir()) == []


def test_methods_joined_by_plus_are_added(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = ["--model.method.weights", "[1.0, 0.5]", "--model.method.methods.1.negatives", "16"]
    planned = plan([*PAIR, "--config", "kd+crd", *weights, "--name", "x"])
    method = planned.model.method
    assert [type(each).__name__ for each in method.methods] == ["KD", "CRD"]
    assert method.loss_weights == {"ce": 0.1, "kd": 0.9, "ce_2": 0.5, "kd_2": 0.0, "crd": 0.4}
    assert method.methods[1].sampler.count == 16
    assert planned.folder == Path("runs/digits_resnet20_resnet8+kd+crd/x")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(planned.settings()))
    again = plan(["--config", "again.yaml", "--name", "y"])
    assert describe(again.model.method) == describe(method)


def test_the_optimizer_with_two_momenta_is_found_by_its_name():
    planned = plan([*PAIR, "--config", "kd", "--model.optimizer", "DOT", "--model.optimizer.delta", "0.05"])
    optimizer = planned.model.optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, DOT)
    assert optimizer.param_groups[0]["delta"] == 0.05


def test_factories_hold_nothing_of_the_parser():
    """A module is copied and pickled with its factories: weight averaging, processes that are spawned."""
    planned = plan([*PAIR, "--model.optimizer", "AdamW"])
    factory = planned.model.optimizer_factory
    assert isinstance(factory, functools.partial)
    assert factory.func is torch.optim.AdamW
    assert describe_factory(factory)["class_path"] == "torch.optim.AdamW"


def test_off_and_on_in_a_file_are_what_the_setting_makes_of_them(tmp_path):
    text = """
model:
  method: {init_args: {attention: off}}
  teacher: {gate: off}
  channels_last: on
  compile: no
trainer: {enable_progress_bar: off}
"""
    (tmp_path / "off.yaml").write_text(text)
    settings = ACKDCLI("fit", [*PAIR, "--config", str(tmp_path / "off.yaml")]).settings()
    found = settings["model"]
    assert (init_args(found["method"])["attention"], found["teacher"]["gate"]) == ("off", "off")
    assert (found["channels_last"], found["compile"], settings["trainer"]["enable_progress_bar"]) == (
        True,
        False,
        False,
    )


def test_several_teachers_replace_the_one_of_the_files():
    settings = model("--model.method", "ackd_lightning.methods.ATSC", "--model.teacher", "[{network: resnet20}]")
    assert [each["network"] for each in settings["teacher"]] == ["resnet20"]
    assert settings["teacher"][0]["weights"] is None


def test_settings_of_a_run_that_another_command_has_not_are_left_out(tmp_path):
    content = ACKDCLI("fit", [*PAIR, "--name", "x"]).settings()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    cli = ACKDCLI("validate", ["--config", str(tmp_path / "config.yaml"), "--ckpt_path", "x.ckpt"])
    assert cli.option("name") is None
    assert cli.settings()["model"] == content["model"]


def test_processes_agree_whether_the_test_is_left_out(monkeypatch, tmp_path):
    """The first process alone has a summary; another one that tested by itself would wait for it."""
    execution = Execution.__new__(Execution)
    execution.cli = SimpleNamespace(datamodule=SimpleNamespace(val_is_test=True), folder=tmp_path)
    execution.option, execution.dry = {"test": True}.get, False
    summary = RunSummary(tmp_path, config="a")  # of a process that is not the first: without a summary
    sent = []
    strategy = SimpleNamespace(broadcast=lambda value: sent.append(value) or True)
    execution.trainer = SimpleNamespace(callbacks=[summary], strategy=strategy, is_global_zero=False)
    monkeypatch.setattr(execution, "_test", lambda: pytest.fail("tests alone"))
    execution._after_fit()
    assert sent == [False]


def test_text_that_looks_like_a_number_stays_text(tmp_path, monkeypatch):
    """Names such as 1e3 are text in YAML of Python, and numbers to the parser that writes settings."""
    monkeypatch.chdir(tmp_path)
    options = ["--data.root", "1e3", "--data.class_order", "text", "--name", "2e5"]
    data = ["--data", "ackd_lightning.data.ImageFolderDataModule"]
    first = ACKDCLI("fit", ["--config", "ce", "--model.student", "resnet8", *data, *options])
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(first.settings()))
    again = ACKDCLI("fit", ["--config", "printed.yaml"])
    assert init_args(again.settings()["data"])["root"] == "1e3"
    assert again.settings() == first.settings()
