from __future__ import annotations

import pytest
from PIL import Image

from ackd_lightning import create_model
from ackd_lightning.cli import main
from ackd_lightning.models.weights import load_weights


@pytest.mark.filterwarnings("ignore:.*near chance.*")  # one epoch makes no teacher
def test_demo_leaves_table_figure_and_student(tmp_path, monkeypatch, capsys):
    """One epoch and one seed of what `make demo` runs; also the case in which no student is ever validated."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--seeds", "1", "--epochs", "1", "--out", "d"]) == 0
    shown = capsys.readouterr().out
    for row in ("teacher resnet20", "resnet8, ce, seed 0", "resnet8, kd, seed 0", "resnet8, ackd, seed 0"):
        assert row in shown
    assert shown.count("digits_resnet20_resnet8+") >= 3
    load_weights(create_model("resnet8", 10), "d/student.safetensors")
    with Image.open("d/curves.png") as image:
        assert min(image.size) > 300
    assert main(["demo", "--out", "d"]) == 2
    assert "holds an earlier demo" in capsys.readouterr().err
