"""``ackd export`` in several formats at once, and what it says when something is missing."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ackd_lightning import create_model, load_student, save_weights
from ackd_lightning.cli import main
from ackd_lightning.commands import export
from ackd_lightning.commands.student import check_data, read_student, trained
from ackd_lightning.deploy.files import open_network
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.files import read_checkpoint

RUN = "runs/digits_resnet8/a"
QUICK = ["--trainer.max_epochs", "1", "--model.lr_scheduler.milestones", "[1]", "--data.max_per_class", "4"]
QUICK += ["--data.batch_size", "20", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a short run on digits, and a copy of it whose data are gone."""
    folder, before = tmp_path_factory.mktemp("formats"), Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", "--config", "digits_resnet8.yaml", "--name", "a", *QUICK]) == 0
        gone = folder / "gone" / "checkpoints"
        gone.mkdir(parents=True)
        (gone / "last.ckpt").write_bytes(Path(RUN, "checkpoints/last.ckpt").read_bytes())
        text = Path(RUN, "config.yaml").read_text()
        start, end = text.index("\ndata:"), text.index("\n", text.index("class_path: ackd_lightning.data"))
        data = "\ndata:\n  class_path: ackd_lightning.data.ImageFolderDataModule\n  init_args:\n    root: nowhere\n"
        following = next(place for place in range(end + 1, len(text)) if text[place - 1] == "\n" and text[place] != " ")
        (folder / "gone/config.yaml").write_text(text[:start] + data + text[following:])
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


def test_several_formats_with_one_table(capsys):
    assert main(["export", RUN, "--format", "safetensors,pt2", "--out", "out/student"]) == 0
    shown = capsys.readouterr().out
    assert "126 validation and 40 training images" in shown
    assert shown.count("100.00%") == 2
    for name in ("out/student.safetensors", "out/student.pt2"):
        description = open_network(name).description
        assert description.class_names == tuple("0123456789")
        assert description.accuracy[0].count == 126
        assert description.data == "DigitsDataModule"
        assert description.crop_pct == 1


def test_the_file_of_a_run_describes_itself():
    description = load_student(f"{RUN}/student.safetensors").description
    assert description.accuracy[0].count == 126
    assert description.mean == (0.3056, 0.3056, 0.3056)
    assert description.interpolation == "bilinear"
    assert description.versions["torch"] == torch.__version__
    assert description.date


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_of_the_bits(dtype):
    assert main(["export", RUN, "--dtype", dtype]) == 0
    assert load_student(f"{RUN}/student-last-{dtype}.safetensors").description.dtype == dtype


def test_the_ending_chooses_the_format_and_uint8_is_read():
    assert main(["export", RUN, "--out", "u.pt2", "--with-preprocessing", "--check", "random"]) == 0
    opened = open_network("u.pt2")
    assert opened.description.reads == "uint8"
    assert "random" in opened.description.checked
    assert opened.run(torch.zeros(3, 3, 16, 16, dtype=torch.uint8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "onxx"], "'onnx'"),
        (["--format", "pt2,tflite"], "tflite"),
        (["--format", "onnx", "pt2"], "onnx,pt2"),
        (["--dtype", "float8"], "float8"),
        (["--dtype", "float16", "--format", "onnx"], "float16"),
        (["--with-preprocessing"], "--with-preprocessing"),
        (["--out", "x.tflite"], "x.tflite"),
        (["--out", "x.onnx", "--format", "onnx,pt2"], "x.onnx"),
        (["--out", "x.onnx", "--format", "pt2"], ".pt2"),
        (["--out", "x.XML", "--format", "openvino"], "ends in .xml"),
        (["--out", "gone", "--format", "onnx,pt2"], "gone/student"),
        (["other"], "other"),
        (["--foo", "3"], "--foo"),
        (["--calibrate", "5"], "--calibrate"),
        (["--format="], "--format"),
        (["--data.root", "x"], "data.root"),
    ],
)
def test_wrong_options_write_nothing(options, words, capsys, place):
    before = sorted(place.rglob("*"))
    assert main(["export", RUN, *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_images_prepared_otherwise_than_in_training_are_refused(capsys):
    other = ["--data.mean", "[0.1,0.1,0.1]", "--data.std", "[0.9,0.9,0.9]"]
    assert main(["export", RUN, "--format", "pt2", "--out", "other.pt2", *other]) == 2
    assert "mean of the data is (0.1, 0.1, 0.1) and was (0.3056, 0.3056, 0.3056)" in capsys.readouterr().err
    assert not Path("other.pt2").exists()
    student = read_student(RUN, "last")
    for changed in ({"input_size": 32}, {"channels": 1}, {"background": "black"}, {"value_range": (0.0, 16.0)}):
        with pytest.raises(ACKDError, match="when the student was trained"):
            check_data(student.checkpoint, student.description.replace(**changed), ["--data.batch_size", "10"])


def test_a_run_is_tested_with_the_options_that_came_with_its_weights():
    options = {"aux_logits": False, "transform_input": True}
    notes = {"model": "googlenet", "model_options": json.dumps(options)}
    file = save_weights(create_model("googlenet", 10, **options), Path("googlenet.safetensors"), notes)
    student = ["--model.student.network", "googlenet", "--model.student.weights", str(file)]
    assert (
        main(["fit", "--config", "digits_resnet8.yaml", "--name", "inception", "--weights_dir", "w", *QUICK, *student])
        == 0
    )
    file.unlink()
    checkpoint = Path("runs/digits_resnet8/inception/checkpoints/last.ckpt")
    assert trained(checkpoint, read_checkpoint(checkpoint)).model.student.plain().transform_input


def test_more_images_than_a_graph_takes_are_read_in_parts():
    assert main(["export", RUN, "--out", "large.pt2", "--check", "random"]) == 0
    opened = open_network("large.pt2")
    assert opened.description.batch == 1024
    assert opened.run(torch.zeros(1024, 3, 16, 16)).shape == (1024, 10)


def test_data_that_are_gone_are_said_with_the_remedy(capsys):
    assert main(["export", "gone", "--format", "pt2"]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert "--data.root" in error
    assert "--check random" in error
    assert main(["export", "gone", "--format", "pt2", "--check", "random"]) == 0
    assert "64 random images" in capsys.readouterr().out


def test_a_file_for_one_image_at_a_time_is_said(monkeypatch, capsys):
    whole = export.export
    monkeypatch.setattr(export, "export", lambda *args, **options: replace(whole(*args, **options), single=True))
    assert main(["export", RUN, "--out", "single.safetensors"]) == 0
    assert "single.safetensors takes one image at a time" in capsys.readouterr().out


def test_one_format_that_fails_does_not_lose_the_others(monkeypatch, capsys):
    monkeypatch.setattr("ackd_lightning.deploy.formats.pt2.graph_of", _refuse)
    assert main(["export", RUN, "--format", "pt2,safetensors", "--out", "half"]) == 2
    done = capsys.readouterr()
    assert "half.safetensors" in done.out
    assert "broken" in done.err
    assert Path("half.safetensors").exists()
    assert not Path("half.pt2").exists()


def _refuse(*_):
    raise ACKDError("broken")
