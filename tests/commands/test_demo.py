from __future__ import annotations

import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from PIL import Image

from ackd_lightning import create_model
from ackd_lightning.cli import main
from ackd_lightning.commands import demo
from ackd_lightning.models.weights import load_weights


@pytest.mark.filterwarnings("ignore:.*near chance.*")  # one epoch makes no teacher
def test_demo_leaves_table_figure_and_student(tmp_path, monkeypatch, capsys):
    """One epoch and one seed of what `make demo` runs, on a few images; no student is ever validated."""
    carry_out = demo._one

    def on_few_images(command, arguments, log):
        few = ["--data.max_per_class", "4"] if command == "fit" else []
        carry_out(command, [*arguments, *few], log)

    monkeypatch.setattr(demo, "_one", on_few_images)
    monkeypatch.setattr(CPUAccelerator, "auto_device_count", lambda *_: 2)  # two processes would run the demo twice
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
    assert "d holds an earlier demo" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seeds", "--epochs"])
def test_numbers_below_one_are_refused(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", option, "0", "--out", "d"]) == 2
    assert f"{option} is 0" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
