"""``ackd export --int8``: calibrated and fine-tuned students in files, side by side with float32."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ackd_lightning import create_model
from ackd_lightning.cli import main
from ackd_lightning.commands import export as command
from ackd_lightning.commands.export_int8 import int8_advice, show_int8
from ackd_lightning.deploy.checking import CheckImages, images_of
from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.files import open_network
from ackd_lightning.deploy.formats.formats import FORMATS
from ackd_lightning.deploy.int8 import Measured, export_int8, fine_tuned, int8_network
from ackd_lightning.deploy.latency import Latency
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.run_data import data_of_run
from ackd_lightning.models.quantization import quantize
from ackd_lightning.runs.export import network_of
from ackd_lightning.runs.files import read_checkpoint

for library in ("torchao", "executorch", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library)

QUIET = ["--trainer.enable_progress_bar", "false"]
PLAIN, TUNED = Path("runs/digits_resnet8/a"), Path("runs/digits_resnet8+qat/b")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained student, and with its fine-tuning for int8 by a teacher."""
    folder, before = tmp_path_factory.mktemp("runs"), Path.cwd()
    os.chdir(folder)
    try:
        short = ["--trainer.max_epochs", "6", "--model.lr_scheduler.milestones", "[4]", "--data.batch_size", "64"]
        assert main(["fit", "--config", "digits_resnet8.yaml", "--name", "a", *short, *QUIET]) == 0
        weights = str(PLAIN / "student.safetensors")
        student = ["--model.student.weights", weights, "--model.student.quantization", "x86"]
        teacher = ["--model.teacher.network", "resnet8", "--model.teacher.weights", weights]
        configs = ["--config", "digits_resnet8.yaml", "--config", "qat.yaml", "--name", "b"]
        assert main(["fit", *configs, *student, *teacher, "--trainer.max_epochs", "2", *QUIET]) == 0
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def parts(place):
    """Network, description, data and images of the plain run."""
    checkpoint = place / PLAIN / "checkpoints" / "last.ckpt"
    network, metadata = network_of(read_checkpoint(checkpoint), checkpoint)
    data = data_of_run(checkpoint)
    return network, Description.from_metadata(metadata, "run"), data, images_of(data)


def accuracy(path, images):
    return images.accuracy(images.logits(open_network(path).logits))


def test_a_calibrated_student_in_onnx(parts, capsys):
    _, _, _, images = parts
    assert main(["export", str(PLAIN), "--int8", "--format", "onnx", "--calibrate", "100", "--overwrite"]) == 0
    opened = open_network(PLAIN / "student-last-int8.onnx")
    assert opened.description.quantization is not None
    assert "100 training images" in opened.description.quantization
    found = accuracy(PLAIN / "student-last-int8.onnx", images)
    assert found == pytest.approx(accuracy(PLAIN / "student.safetensors", images), abs=0.03)
    (stated,) = opened.description.accuracy
    assert (stated.part, stated.count) == ("val", images.counted)
    assert stated.value == pytest.approx(found, abs=1e-6)  # of the file itself
    for count in (1, 5):
        assert opened.logits(torch.zeros(count, 3, 16, 16)).shape == (count, 10)
    assert "float32" in capsys.readouterr().out


@pytest.mark.slow
def test_preprocessing_and_every_format(parts):
    _, _, _, images = parts
    arguments = ["--int8", "--format", "pt2,pte,onnx", "--with-preprocessing", "--out", "raw", "--overwrite"]
    assert main(["export", str(PLAIN), *arguments]) == 0
    for ending in ("pt2", "pte", "onnx"):
        assert open_network(f"raw.{ending}").description.reads == "uint8"
        assert accuracy(f"raw.{ending}", images) == pytest.approx(
            accuracy(PLAIN / "student.safetensors", images), abs=0.03
        )
    sizes = [Path(f"raw.{ending}").stat().st_size for ending in ("pte", "onnx")]
    assert max(sizes) < 0.7 * (PLAIN / "student.safetensors").stat().st_size


def test_a_fine_tuned_student_computes_in_a_file_as_in_validation(parts):
    _, _, _, images = parts
    assert main(["export", str(TUNED), "--int8", "--format", "onnx", "--overwrite", "--check", "random"]) == 0
    assert open_network(TUNED / "student.safetensors").description.origin["trained_for_int8"] == "x86"
    opened = open_network(TUNED / "student-last-int8.onnx")
    assert "fine-tuned" in str(opened.description.quantization)
    checkpoint = TUNED / "checkpoints" / "last.ckpt"
    content = read_checkpoint(checkpoint)
    network, _ = network_of(content, checkpoint)
    student = fine_tuned(content, checkpoint, network)
    inside, outside = images.logits(student), images.logits(opened.logits)
    assert float((inside.argmax(1) == outside.argmax(1)).float().mean()) > 0.98
    assert images.accuracy(inside) == pytest.approx(accuracy(PLAIN / "student.safetensors", images), abs=0.03)


def test_the_test_set_and_a_longer_training_read_its_checkpoint(capsys):
    assert main(["test", str(TUNED)]) == 0
    longer = ["--config", "digits_resnet8.yaml", "--config", "qat.yaml", "--resume", str(TUNED)]
    longer += ["--model.student.weights", str(PLAIN / "student.safetensors"), "--model.student.quantization", "x86"]
    longer += ["--model.teacher.network", "resnet8", "--model.teacher.weights", str(PLAIN / "student.safetensors")]
    assert main(["fit", *longer, "--trainer.max_epochs", "3", *QUIET]) == 0
    assert read_checkpoint(TUNED / "checkpoints" / "last.ckpt")["epoch"] == 2


def test_a_network_fine_tuned_for_other_kernels_is_refused(parts):
    checkpoint = TUNED / "checkpoints" / "last.ckpt"
    content = read_checkpoint(checkpoint)
    network, _ = network_of(content, checkpoint)
    with pytest.raises(ACKDError, match="xnnpack"):
        int8_network(network, fine_tuned(content, checkpoint, network), "pte", None, count=1)
    for key in [key for key in content["state_dict"] if "activation_post_process" in key]:
        del content["state_dict"][key]
    with pytest.raises(ACKDError, match=r"last\.ckpt"):
        fine_tuned(content, checkpoint, network)


def test_a_network_that_guesses_is_refused(parts, tmp_path):
    network, description, _, images = parts
    torch.manual_seed(0)
    guessing = quantize(create_model("resnet8", 10).eval(), torch.randn(8, 3, 16, 16), backend="x86")
    target = tmp_path / "a.onnx"
    with pytest.raises(ACKDError, match=rf"a\.onnx .* of {images.counted} validation images, .*; fine-tune it"):
        export_int8(
            network,
            guessing,
            "int8",
            description,
            target,
            FORMATS["onnx"],
            images=images,
            reference=images.logits(network),
            advice="fine-tune it",
        )
    assert not list(tmp_path.iterdir())


def test_calibration_reads_training_images_as_evaluation_does(parts, monkeypatch):
    network, _, data, _ = parts
    seen = []
    monkeypatch.setattr("ackd_lightning.deploy.int8.quantize", lambda network, images, backend: seen.extend(images))
    _, words = int8_network(network, None, "pte", data, count=70)
    assert words == "int8 for xnnpack, calibrated on 70 training images"
    images = torch.cat(seen)
    assert images.shape == (70, 3, 16, 16)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    whole = torch.cat([each.image for each in data.loader_in_order("train")]).float() / 255
    every = (whole - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    exact = "donot_use_mm_for_euclid_dist"  # products lose the digits of small distances, on some processors more
    distance = torch.cdist(images.flatten(1), every.flatten(1), compute_mode=exact).min(dim=1).values
    assert float(distance.max()) < 1e-2
    again = []
    monkeypatch.setattr("ackd_lightning.deploy.int8.quantize", lambda network, images, backend: again.extend(images))
    int8_network(network, None, "pte", data, count=70)
    assert torch.equal(torch.cat(again), images)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--format", "safetensors"], "safetensors"),
        (["--format", "openvino"], "openvino"),
        (["--format", "onnx", "--calibrate", "0"], "calibrate"),
        (["--format", "onnx", "--learner", "1"], "learner"),
        (["--format", "onnx", "--check", "random"], "random"),
    ],
)
def test_options_that_do_not_go_together(arguments, named, capsys):
    assert main(["export", str(PLAIN), "--int8", *arguments, "--out", f"no{FORMATS[arguments[1]].ending}"]) != 0
    assert named in capsys.readouterr().err
    assert not list(Path().glob("no.*"))


def test_without_its_library_nothing_is_read(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(command, "read_student", None)
    assert main(["export", str(PLAIN), "--int8", "--format", "onnx,pt2", "--out", "no"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("--int8 needs the library torchao, which is not installed") == 1


def test_images_to_calibrate_a_fine_tuned_student_on_are_refused(capsys):
    assert main(["export", str(TUNED), "--int8", "--format", "onnx", "--calibrate", "9", "--out", "no.onnx"]) == 2
    assert "fine-tuned for int8 already" in capsys.readouterr().err
    assert not Path("no.onnx").exists()


def test_a_constant_answer_guesses_where_one_class_has_most_images():
    targets = torch.tensor([0] * 70 + [1] * 20 + [-1] * 10)
    images = CheckImages([(torch.zeros(100, 1), targets)], lambda each: each, part="val", counted=100, words="")
    constant, right = torch.eye(2)[torch.zeros(100).long()], torch.eye(2)[targets.clamp(min=0)]
    assert images.accuracy(constant) == pytest.approx(7 / 9)
    assert images.may_be_chance(constant)
    assert not images.may_be_chance(right)
    images = CheckImages(
        [(torch.zeros(100, 1), -torch.ones(100).long())], images.logits, part=None, counted=0, words=""
    )
    assert not images.may_be_chance(constant)  # no image has a class


def test_what_int8_costs_is_said(parts, tmp_path, capsys):
    _, _, _, images = parts
    latency = Latency(batch=1, device="cpu", threads=1, median=1e-3, spread=0.0, passes=9)
    slow = replace(latency, median=4e-3)

    def shown(right):
        pair = (Measured("float32", 9, 1.0, 0.9, latency, False), Measured("int8", 5, 0.9, right, slow, True))
        show_int8([FORMATS["onnx"]], [tmp_path / "a.onnx"], lambda *_: pair, images=images, advice="fine-tune it")
        return capsys.readouterr().out

    fewer = 0.9 - 3 / images.counted
    assert "a.onnx is right for 3 fewer of" in shown(fewer)
    assert "fine-tune it" in shown(0.5)
    text = shown(0.9 - 2 / images.counted)  # two images are no evidence
    assert "fewer" not in text
    assert "int8 takes 4.0 times as long as float32 in onnx" in text
    assert "a.onnx takes one image at a time" in text


def test_the_advice_knows_what_was_done():
    command = int8_advice(PLAIN, {}, tuned=False).removeprefix("fine-tune it: ackd fit ")
    settings = ACKDCLI("fit", shlex.split(command)).settings()  # it can be typed as it is printed
    assert settings["model"]["lr_scheduler"]["init_args"]["T_max"] == settings["trainer"]["max_epochs"] == 10
    assert settings["model"]["method"]["class_path"].endswith("CE")
    assert "ce.yaml" not in int8_advice(PLAIN, {"teacher": {"model": "resnet20"}}, tuned=False)
    assert "qat.yaml" not in int8_advice(TUNED, {}, tuned=True)
    assert int8_advice(Path("nowhere"), {}, tuned=False) == "fine-tune its student with --config qat.yaml"


def test_a_tuned_student_in_float32_states_its_own_accuracy(tmp_path):
    """In training it was measured as the int8 network."""
    assert main(["export", str(TUNED), "--out", str(tmp_path / "float.safetensors")]) == 0
    opened = open_network(tmp_path / "float.safetensors")
    data = data_of_run(TUNED / "checkpoints" / "last.ckpt")
    images = images_of(data)
    (stated,) = [each for each in opened.description.accuracy if each.part == "val"]
    assert stated.value == pytest.approx(images.accuracy(images.logits(opened.logits)))
    assert not open_network(TUNED / "student.safetensors").description.accuracy
    assert not json.loads((TUNED / "summary.json").read_text())["last_is_final"]
