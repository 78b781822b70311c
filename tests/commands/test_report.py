"""``ackd report``: the page, its numbers and its figures."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ackd_lightning.cli import main
from ackd_lightning.commands import report as command
from ackd_lightning.deploy.report import cost, gradcam, writing
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weights import read_metadata, save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.runs.answers import answers_file, read_answers
from ackd_lightning.runs.export import weights_mark
from ackd_lightning.runs.files import read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
FIT = ["fit", "--trainer.max_epochs", "1", "--weights_dir", "null", "--trainer.limit_train_batches", "2"]
SMALL = ["--data.max_per_class", "20"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A teacher, and ACKD with a branch and a peer, both hardly trained."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_weights(create_model("resnet14", 10).state_dict(), Path("teacher.safetensors"), {"model": "resnet14"})
        teacher = ["--model.teacher.gate", "off", "--model.teacher.network", "resnet14", "--model.teacher.weights"]
        teacher += ["teacher.safetensors"]
        method = ["--model.method.branches", "[D2B2, peer]", "--test"]
        assert main([*FIT, *SMALL, "--config", "digits_resnet20_resnet8", *teacher, *method, "--name", "a"]) == 0
    return folder


@pytest.fixture
def run(runs, monkeypatch, tmp_path):
    """A copy of the run, and fast measurements of speed."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    usual = cost.measure_latency
    monkeypatch.setattr(cost, "measure_latency", lambda *args, **options: usual(*args, **{**options, "seconds": 0.0}))
    return Path("runs/digits_resnet20_resnet8/a")


@pytest.mark.slow
def test_the_page_of_a_run(run, capsys):
    assert main(["report", str(run)]) == 0
    folder = run / "report"
    found = json.loads((folder / "report.json").read_text())
    answers = read_answers(answers_file(run, "last"))
    assert found["accuracy"]["student"]["right"] == int(answers.right.sum())
    assert list(found["accuracy"]) == ["student", "teacher", "aux1", "aux2", "ensemble"]
    assert found["weights"] == weights_mark(read_checkpoint(run / "checkpoints/last.ckpt"))
    assert found["images"] == len(answers) == sum(each["images"] for each in found["classes"])
    counts = [found["agreement"][key] for key in ("both_right", "only_student", "only_teacher", "both_wrong")]
    assert sum(counts) == found["images"]
    assert counts[0] + counts[1] == found["accuracy"]["student"]["right"]
    names = [each["name"] for each in found["cost"]]
    assert names == ["student resnet8", "teacher resnet14", "student.safetensors"]
    student, teacher, file = found["cost"]
    assert [each["batch"] for each in student["latency"]] == [1, 32]
    assert student["parameters"] < teacher["parameters"]
    assert (file["right"], file["asked"]) == (found["accuracy"]["student"]["right"], found["images"])
    assert found["calibration"]["temperature"] > 0
    assert found["training"]["epochs"] == 1
    assert found["learners"][0]["parameters"] > 0
    figures = {each.stem for each in (folder / "figures").iterdir()}
    assert figures == {"per_class", "confusion", "reliability", "mistakes", "gradcam"}
    markdown, page = ((folder / f"report.{each}").read_text() for each in ("md", "html"))
    assert {*re.findall(r"figures/(\w+)\.png", markdown)} == figures
    assert "figures/" not in page  # all inside
    assert page.count("data:image/png;base64,") == len(figures)
    assert page.count("<table>") == markdown.count("\n\n|")
    assert "report.html" in capsys.readouterr().out


def test_a_file_without_a_run_and_without_its_libraries(run, monkeypatch, capsys):
    Path("cache").mkdir()
    shutil.copy(run / "student.safetensors", "cache/model.safetensors")
    monkeypatch.setattr(command, "local_file", lambda _: Path("cache/model.safetensors"))

    def missing(module, extra, needed_by):
        raise ACKDError(f"{needed_by} needs grad-cam; run: pip install 'ackd-lightning[{extra}]'")

    monkeypatch.setattr(gradcam, "require", missing)
    data = ["--config", "data/digits.yaml", "--data.val_fraction", "0"]
    assert main(["report", "hf:anna/digits", "--no-latency", *data]) == 0
    found = json.loads(Path("model-report/report.json").read_text())
    assert found["source"] == "hf:anna/digits"
    answers = read_answers(answers_file(run, "last"))
    assert found["accuracy"]["student"]["right"] == int(answers.right.sum())
    assert "temperature" not in found["calibration"]
    assert found["agreement"] is None
    assert "ackd-lightning[gradcam]" in found["no_gradcam"]
    assert "ackd-lightning[gradcam]" in capsys.readouterr().out
    assert not Path("model-report/figures/gradcam.png").exists()


@pytest.mark.slow
def test_what_is_missing_is_named_and_the_rest_is_measured(run):
    Path("teacher.safetensors").unlink()
    (run / "broken.onnx").write_bytes(b"x")
    assert main(["report", str(run), "--no-latency", "--out", "page"]) == 0
    found = json.loads(Path("page/report.json").read_text())
    assert "teacher" not in found["accuracy"]
    assert any("teacher.safetensors" in each for each in found["notes"])
    assert any("broken.onnx" in each for each in found["notes"])
    assert "broken.onnx" in Path("page/report.md").read_text()


@pytest.mark.parametrize("classes", [10, 12])
def test_a_teacher_whose_classes_do_not_match_is_left_out(run, classes):
    names = json.dumps([f"other{number}" for number in range(classes)])
    metadata = {"model": "resnet14", "class_names": names}
    save_weights(create_model("resnet14", classes).state_dict(), Path("teacher.safetensors"), metadata)
    assert main(["report", str(run), "--no-latency", "--out", "page"]) == 0
    found = json.loads(Path("page/report.json").read_text())
    assert found["notes"][0].startswith("the teacher is left out: ")
    assert "teacher" not in found["accuracy"]
    assert found["agreement"] is None
    assert not any(each["name"].startswith("teacher") for each in found["cost"])


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["nowhere"], "nowhere"),
        (["net.safetensors"], "net.safetensors"),
        (["net.safetensors", "--config", "data/digits.yaml", "--data.image_size", "8"], "image_size"),
        (["net.safetensors", "--config", "data/cifar100.yaml"], "cifar"),
        (["RUN", "--out", "notes"], "notes"),
        (["RUN", "--out", "notes/x.txt"], "notes/x.txt"),
        (["RUN", "--device", "tpu"], "tpu"),
        (["RUN", "--which", "first"], "first"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(run, arguments, value, capsys):
    shutil.copy(run / "student.safetensors", "net.safetensors")
    Path("notes").mkdir()
    Path("notes/x.txt").write_text("x")
    assert main(["report", *(str(run) if each == "RUN" else each for each in arguments)]) == 2
    error = capsys.readouterr().err
    assert value.lower() in error.lower()
    assert error.startswith("ackd: ")
    assert not list(Path().rglob("report.json"))


def test_a_full_disk_is_one_sentence(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "markdown", lambda *_: "# a")
    writing.write({"old": 1}, {}, tmp_path)
    monkeypatch.setattr("ackd_lightning.writing.os.fsync", full)
    with pytest.raises(ACKDError, match="No space left"):
        writing.write({"new": 1}, {"figure": b"x"}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == {"old": 1}
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_machine_has_a_name():
    assert command._machine()
    assert torch.get_num_threads() >= 1


def test_a_file_with_data_named_by_their_class(run):
    data = ["--data", "ackd_lightning.data.DigitsDataModule", "--data.max_per_class", "20", "--no-latency"]
    assert main(["report", str(run / "student.safetensors"), *data, "--out", "by-class"]) == 0
    assert Path("by-class/report.json").is_file()
    lead = Path("by-class/report.md").read_text().partition("## About this page")[0]
    assert "student.safetensors" not in lead  # the part that ackd push publishes
    assert str(run) not in lead


def test_a_file_beside_settings_of_another_program(run):
    shutil.copy(run / "student.safetensors", "net.safetensors")
    Path("config.yaml").write_text("app: camera")
    assert main(["report", "net.safetensors", "--config", "data/digits.yaml", *SMALL, "--no-latency"]) == 0
    assert Path("net-report/report.json").is_file()


def test_a_file_of_a_run_has_a_report_of_its_own(run):
    assert main(["report", str(run / "student.safetensors"), "--no-latency"]) == 0
    assert (run / "student-report/report.json").is_file()
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("left", "refused"),
    [
        ({"figures": "", "report.md": "# Report: resnet8", ".report.html.1.tmp": ""}, False),
        ({"figures": "", "report.md": "# Report: resnet8", "report.html": "", ".report.json.1.tmp": ""}, False),
        ({"report.json": '{"command": "ackd report runs/a"}', "report.md": "", "mine": ""}, False),
        ({"notes": ""}, True),
        ({"report.md": "my thesis"}, True),
        ({"report.html": "my page"}, True),
        ({"report.json": '{"tests": 3}', "report.html": "", "setup.py": ""}, True),
    ],
)
def test_what_an_interrupted_report_left_is_replaced_and_nothing_else(left, refused, tmp_path):
    target = tmp_path / "report"
    target.mkdir()
    for name, content in left.items():
        (target / name).write_text(content)
    if refused:
        with pytest.raises(ACKDError, match="exists and is not a report"):
            command._check_folder(target)
    else:
        command._check_folder(target)


@pytest.mark.parametrize("file", ["", "student.safetensors"])
def test_other_test_images_are_said_on_the_page(run, file):
    page = run / ("student-report" if file else "report")
    for options, otherwise in (
        (["--data.val_fraction", "0.2"], "settings"),
        (["--data.batch_size", "7", "--data.max_per_class", "10"], ""),
    ):
        assert main(["report", str(run / file), "--no-latency", *options]) == 0
        assert json.loads((page / "report.json").read_text())["measured_otherwise"] == otherwise
        said = "measured with other settings than the run has" in (page / "report.md").read_text()
        assert said == bool(otherwise)


@pytest.mark.parametrize(("name", "stated"), [("background", "black"), ("value_range", "[0, 20]")])
def test_a_file_is_not_measured_on_images_that_are_read_otherwise_than_it_states(run, name, stated, capsys):
    own = run / "student.safetensors"
    metadata = {**read_metadata(own), name: stated}
    save_weights(load_file(own), Path("net.safetensors"), metadata)
    for number in range(10):
        folder = Path("photos/test") / str(number)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / "a.png")
    shutil.copytree("photos/test", "photos/train")
    size = ["--data.image_size", metadata["input_size"], "--data.val_fraction", "0"]
    photos = ["--data", "ackd_lightning.data.ImageFolderDataModule", "--data.root", "photos", *size]
    command = ["report", "net.safetensors", *photos, "--no-latency"]
    assert main(command) == 2
    assert f"{name} of the data is " in (said := capsys.readouterr().err)
    assert f"when net.safetensors was trained; set --data.{name} to that" in said
    assert not Path("net-report").exists()
    assert main([*command, f"--data.{name}", stated]) == 0
    digits = ["report", "net.safetensors", "--config", "data/digits.yaml", *SMALL, "--no-latency", "--out", "other"]
    assert main(digits) == (0 if name == "background" else 2)  # digits have no transparent pixels
    assert ("name images of that kind" in capsys.readouterr().err) == (name == "value_range")


def test_a_network_that_answers_nan_has_no_page(run, capsys):
    path = run / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    name = next(key for key in content["state_dict"] if key.endswith("network.fc.bias") or key.endswith(".fc.bias"))
    content["state_dict"][name][0] = float("nan")
    torch.save(content, path)
    assert main(["report", str(run), "--no-latency"]) == 2
    assert "test images with NaN or infinite logits" in capsys.readouterr().err
    assert not (run / "report/report.json").exists()


def test_a_file_with_the_classes_in_another_order_has_the_same_accuracy(run):
    own = run / "student.safetensors"
    metadata, tensors = read_metadata(own), load_file(own)
    for key in ("fc.weight", "fc.bias"):
        tensors[key] = tensors[key].flip(0)
    reverse = json.dumps(json.loads(metadata["class_names"])[::-1])
    save_weights(tensors, run / "reverse.safetensors", {**metadata, "class_names": reverse})
    other = json.dumps([f"other{number}" for number in range(10)])
    save_weights(tensors, run / "other.safetensors", {**metadata, "class_names": other})
    assert main(["report", str(run), "--no-latency", "--out", "page"]) == 0
    found = json.loads(Path("page/report.json").read_text())
    right = {each["name"]: each["right"] for each in found["cost"] if each["asked"]}
    assert right["reverse.safetensors"] == right["student.safetensors"] == found["accuracy"]["student"]["right"]
    assert [each for each in found["notes"] if each.startswith("other.safetensors is left out: ")]


def test_a_file_of_earlier_weights_is_left_out(run):
    own, checkpoint = run / "student.safetensors", read_checkpoint(run / "checkpoints/last.ckpt")["ackd_lightning"]
    trained = checkpoint["epochs_trained"]
    for name, epochs, time in (("", 0.5, 0), ("-new", 0.5, None), ("-copy", trained, 0)):
        file = run / f"student-last{name}.safetensors"
        save_weights(load_file(own), file, {**read_metadata(own), "epochs": str(epochs)})
        if time is not None:
            os.utime(file, (time, time))
    assert main(["report", str(run), "--no-latency", "--out", "page"]) == 0
    found = json.loads(Path("page/report.json").read_text())
    left = [each for each in found["notes"] if "exported before the run ended" in each]
    assert [each.partition(" is left out")[0] for each in left] == [
        "student-last-new.safetensors",
        "student-last.safetensors",
    ]
    assert found["no_temperature"] is None
    assert found["calibration"]["validation_images"]
