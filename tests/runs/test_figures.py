"""Metrics by epoch, and the figures of a run."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from ackd_lightning.callbacks.figures import draw_figures
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.figures import _curves, _draw, draw_run, new_figure, read_metrics, save_figure

ROWS = """epoch,lr/student,step,train/loss,train/disc_acc,val/acc,val/aux1_acc,val/attention_entropy
,0.1,0,,,,,
0,,9,,,0.5,0.4,0.6
0,,9,2.5,0.7,,,
,0.01,10,,,,,
1,,19,,,0.6,0.5,0.5
1,,19,nan,0.8,,,
,0.02,10,,,,,
1,,19,,,0.75,0.5,0.5
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.csv").write_text(ROWS)
    return tmp_path


def test_an_epoch_that_was_repeated_has_its_last_values(run):
    metrics = read_metrics(run / "metrics.csv")
    assert metrics["val/acc"] == {1: 0.5, 2: 0.75}
    assert metrics["lr/student"] == {1: 0.1, 2: 0.02}
    assert "step" not in metrics


def test_figures_are_images(run):
    assert [path.name for path in draw_run(run)] == ["curves.png", "learners.png"]
    for name in ("curves.png", "learners.png"):
        with Image.open(run / name) as image:
            assert image.size[0] > image.size[1] > 300


def test_a_run_with_one_network_has_one_figure(run):
    (run / "metrics.csv").write_text("epoch,step,val/acc,train/loss\n0,9,0.5,1.0\n")
    assert [path.name for path in draw_run(run)] == ["curves.png"]
    (run / "metrics.csv").write_text("epoch,step\n")
    assert draw_run(run) == []


def test_what_cannot_be_drawn_is_a_warning(run, monkeypatch):
    (run / "metrics.csv").write_text("epoch,step,val/acc\n0,1,many\n")
    with pytest.raises(ACKDError, match="many"):
        read_metrics(run / "metrics.csv")
    with pytest.warns(UserWarning, match="no figures"):
        draw_figures(run)
    monkeypatch.delitem(sys.modules, "ackd_lightning.runs.figures")
    for name in [each for each in sys.modules if each.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match="pip install matplotlib"):
        draw_figures(run)
    assert not list(run.glob("*.png"))


def test_equal_lines_are_one_and_losses_say_what_they_are():
    equal = {1: 0.1, 2: 0.01}
    panels = _curves({"lr/student": equal, "lr/student_no_decay": dict(equal), "lr/own": {1: 0.2, 2: 0.02}})
    assert list(panels["learning rate"]) == ["student, student_no_decay", "own"]
    panels = _curves({"train/loss": {1: 3.0}, "val/loss": {1: 2.0}})
    assert list(panels["loss"]) == ["train, all terms", "val, cross-entropy"]


def test_what_was_measured_once_can_be_seen():
    (axes,) = new_figure(4, 3)[1]
    _draw(axes, "accuracy in %", {"train": {1: 20.0}, "val, teacher": {1: 98.0}, "val, student": {1: 12.0, 2: 40.0}})
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["val, teacher"].get_ydata()) == [98.0, 98.0]
    assert lines["train"].get_marker() == "."
    (axes,) = new_figure(4, 3)[1]
    _draw(axes, "accuracy in %", {"val, teacher": {1: 98.0, 2: 97.0}})  # one that is trained, too
    assert list(axes.lines[0].get_ydata()) == [98.0, 97.0]


def test_names_are_no_formulas_and_numbers_are_powers(tmp_path):
    figure, (axes,) = new_figure(4)
    axes.plot([1, 2, 3], [1e-6, 1e-3, 1.0], label="costs $5_{ or $6")
    axes.set_yscale("log")
    axes.set_title("a$5_{$")
    axes.set_xticks([1, 2, 3], ["$x_{$", "b", "c"])
    axes.legend()
    save_figure(figure, tmp_path / "a.png")
    assert all(not each.get_parse_math() for each in axes.get_xticklabels())
    powers = [each for each in axes.get_yticklabels() if "mathdefault" in each.get_text()]
    assert powers
    assert all(each.get_parse_math() for each in powers)
