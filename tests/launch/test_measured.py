"""What ``ackd test`` and ``ackd validate`` print."""

from __future__ import annotations

from pathlib import Path

import torch

from ackd_lightning.launch.measured import show_measured
from ackd_lightning.runs.answers import Answers


def cells(text):
    return [line.strip("│┃ ").split() for line in text.splitlines() if line.startswith("│")]


def test_each_network_of_each_loader_has_a_row(capsys):
    values = {"val/acc": 0.5, "val/acc_top5": 0.75, "val/aux1_acc": 0.25, "val2/acc": 0.125, "val/loss": 1.5}
    show_measured(values, "validate", Path("last.ckpt"), classes=20)
    shown = capsys.readouterr().out
    assert cells(shown) == [
        ["student", "│", "50.00", "│", "75.00"],
        ["aux1", "│", "25.00", "│", "-"],
        ["student", "(val2)", "│", "12.50", "│", "-"],
    ]
    assert "validate, last.ckpt:" in shown
    assert "also measured: loss 1.5" in shown
    assert "images" not in shown


def test_few_classes_have_no_top_5_and_answers_give_an_interval(capsys):
    target, probability = torch.zeros(100, dtype=torch.long), torch.ones(100)
    answers = Answers(target, (torch.arange(100) >= 80).long(), probability, "", "Digits")
    values = {"test/acc": 0.8, "test/acc_top5": 1.0}
    show_measured(values, "test", Path("last.ckpt"), classes=19, answers=answers)
    shown = capsys.readouterr().out
    assert cells(shown) == [["student", "│", "80.00"]]
    assert "accuracy 80.00 % (95 % interval 71.12 to 86.66) of 100 test images" in shown
    assert "also" not in shown
