"""The short help: its settings exist, with these defaults, and printing it does not wait for torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from ackd_lightning.cli import main
from ackd_lightning.launch import LIGHTNING
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.options import make_parser
from ackd_lightning.launch.short_help import ENTRIES, short_help


@pytest.mark.parametrize("command", LIGHTNING)
def test_short_help_is_short_and_printed_without_torch(command):
    code = f"import sys; from ackd_lightning.cli import main; main([{command!r}, '--config', 'x', '--help'])\n"
    code += "print([name for name in ('torch', 'lightning', 'jsonargparse') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"
    assert len(shown.splitlines()) <= 100
    assert "--help all" in shown


def test_its_settings_exist_with_these_defaults(tmp_path):
    bare = {
        "data": {"class_path": "ackd_lightning.data.CIFAR100DataModule"},
        "model": {"student": "resnet8", "teacher": {"network": "resnet20"}, "method": {"class_path": "KD"}},
    }
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(bare))
    cli = ACKDCLI("fit", ["--config", str(tmp_path / "bare.yaml")])
    content, wrong = cli.settings(), {}
    for entry in ENTRIES:
        value = content
        for part in entry.name.split("."):
            value = value.get("init_args", value)
            assert part in value, entry.name
            value = value[part]
        if isinstance(value, dict):
            value = value["class_path"].rpartition(".")[2]
        if not entry.shown and value != entry.default:
            wrong[entry.name] = value
    assert wrong == {}
    shown = {"data.root": "data", "model.optimizer": "SGD", "model.lr_scheduler": "MultiStepLR", "on_nonfinite": "stop"}
    assert shown.items() <= {entry.name: entry.shown for entry in ENTRIES}.items()
    assert cli.option("data.init_args.root") == "data"
    assert cli.option("model.on_nonfinite") == "stop"
    assert cli.option("model.optimizer.class_path").endswith(".SGD")
    assert cli.option("model.lr_scheduler.class_path").endswith(".MultiStepLR")


def test_settings_of_an_evaluation_exist():
    for command in set(LIGHTNING) - {"fit"}:
        known = {*make_parser(command).names(), "data.root", "data.num_workers", "data.eval_batch_size", "which"}
        words = [line.split()[0] for line in short_help(command).splitlines() if line.startswith("  --")]
        assert {word.removeprefix("--") for word in words} <= known
        assert words


def test_complete_help_has_every_setting(capsys):
    assert main(["fit", "--help", "all"]) == 0
    shown = capsys.readouterr().out
    assert "--trainer.num_sanity_val_steps" in shown
    assert "--model.student.backbone_lr_scale" in shown
