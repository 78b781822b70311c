"""A constructor that fails is reported in its own words, with its file and line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ackd_lightning.cli import main

METHOD = """
from ackd_lightning import CE

class Mine(CE):
    def __init__(self, *, weight_ce: float = 1.0) -> None:
        super().__init__(weight_ce=weight_ce)
        {broken}
"""
CALLBACK = """
import lightning.pytorch as L

class Mine(L.Callback):
    def __init__(self, every: int = 1) -> None:
        raise RuntimeError("no such display")
"""
DATA = """
from ackd_lightning.data import DigitsDataModule

class Mine(DigitsDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        raise OSError("the camera is off")
"""
FIT = ["fit", "--config", "digits_resnet20.yaml", "--weights_dir", "null", "--trainer.fast_dev_run", "1"]


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (
            METHOD.format(broken="{}['no such entry']"),
            ["--model.method", "own.Mine"],
            "KeyError in own.py line 7: 'no such entry'",
        ),
        (
            METHOD.format(broken="len(3)"),
            ["--model.method", "own.Mine"],
            "TypeError in own.py line 7: object of type 'int'",
        ),
        (
            METHOD.format(broken="raise ValueError('odd weight')"),
            ["--model.method", "own.Mine"],
            "own.py line 7: odd weight",
        ),
        (CALLBACK, ["--trainer.callbacks+", "own.Mine"], "RuntimeError in own.py line 6: no such display"),
        (DATA, ["--data", "own.Mine"], "OSError in own.py line 6: the camera is off"),
        ("", ["--model.student", "vit_b_16"], "224"),
        ("", ["--model.method", "ackd_lightning.methods.KD", "--model.teacher.network", "resnet21"], "did you mean"),
    ],
)
def test_the_reason_and_its_place_are_named(source, options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    Path("own.py").write_text(source)
    assert main([*FIT, *options]) == 2
    shown = capsys.readouterr().err.strip()
    sys.modules.pop("own", None)
    assert words in shown
    assert "Union" not in shown
    assert len(shown.splitlines()) == 1
