"""Export, load and compare runs of ATSC, AI-KD, ACN and ACKD, as a user does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ackd_lightning import DistillationModule, create_model, load_student, load_weights, save_weights
from ackd_lightning.cli import main
from ackd_lightning.commands.compare import compare
from ackd_lightning.errors import ACKDError
from ackd_lightning.metrics.guessing import MeanRecall
from ackd_lightning.models.weights import read_metadata
from ackd_lightning.models.zoo import count_parameters

QUICK = ["--trainer.max_epochs", "2", "--model.lr_scheduler.milestones", "[1]", "--data.max_per_class", "4"]
QUICK += ["--data.batch_size", "20", "--trainer.enable_progress_bar", "false"]
NO_GATE = ["--model.teacher.gate", "off"]
WEIGHTS = {name: f"weights/digits_{name}.safetensors" for name in ("resnet8", "resnet20")}


def fit(config: str, name: str, *more: str) -> Path:
    assert main(["fit", "--config", config, "--name", name, *QUICK, *more]) == 0
    return Path("runs") / config.removesuffix(".yaml") / name


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with teachers and with short runs of the four methods."""
    folder, before = tmp_path_factory.mktemp("runs"), Path.cwd()
    os.chdir(folder)
    torch.manual_seed(0)
    try:
        for name, path in WEIGHTS.items():
            save_weights(create_model(name, 10), Path(path), {"model": name})
        fit("digits_resnet20_resnet8_atsc.yaml", "one", *NO_GATE)
        two = [{"network": name, "weights": WEIGHTS[name], "gate": "off"} for name in ("resnet20", "resnet8")]
        fit("digits_resnet20_resnet8_atsc.yaml", "two", "--model.teacher", json.dumps(two), "--seed_everything", "1")
        fit("digits_resnet8_aikd.yaml", "a", *NO_GATE)
        three = ["--model.method.classifiers", "[peer, resnet14]", "--model.method.warmup_epochs", "1"]
        fit("digits_resnet8_acn.yaml", "a", *three, "--test")
        fit("digits_resnet20_resnet8.yaml", "a", *NO_GATE)
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)


ATSC = Path("runs/digits_resnet20_resnet8_atsc")
ACN = Path("runs/digits_resnet8_acn/a")


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_export_of_atsc_is_what_was_trained_and_counted(name):
    run = ATSC / name
    summary = json.loads((run / "summary.json").read_text())
    student = load_student(run / "student.safetensors")
    assert not student.training
    assert summary["parameters"] == count_parameters(student)
    assert summary["plain_parameters"] == count_parameters(create_model("resnet8", 10)) < summary["parameters"]
    assert not any(key.startswith("backbone.fc") for key in student.state_dict())  # the student's own classifier
    module = DistillationModule.load_from_checkpoint(run / "checkpoints/last.ckpt", weights_only=True).eval()
    image = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(module(image), student(image), atol=1e-5)
        own = module.student(image).logits
        assert not torch.allclose(own, student(image), atol=1e-2)
    assert ("other_teachers" in summary) is (name == "two")


def test_validation_measures_the_kept_path_and_a_test_agrees():
    run = ATSC / "one"
    assert main(["test", str(run), "--trainer.enable_progress_bar", "false"]) == 0
    assert main(["predict", str(run), "--output", "p.csv", "--trainer.enable_progress_bar", "false"]) == 0
    rows = [line.split(",") for line in Path("p.csv").read_text().splitlines()[1:]]
    right = sum(target == prediction for _, _, target, prediction, *_ in rows) / len(rows)
    tested = json.loads((run / "summary.json").read_text())["test"]["last"]["test/acc"]
    assert tested == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize(("stated", "share", "said"), [(0.99, 1.0, True), (None, 1.0, False), (0.99, 1, False)])
def test_an_accuracy_that_the_run_did_not_measure_is_said(stated, share, said, tmp_path, capsys):
    shutil.copytree(ATSC / "one", tmp_path / "one")
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    summary["last"]["val/acc"] = stated or summary["last"]["val/acc"]
    summary["limit_val_batches"] = share
    (tmp_path / "one/summary.json").write_text(json.dumps(summary))
    assert main(["export", str(tmp_path / "one"), "--out", str(tmp_path / "file.safetensors")]) == 0
    assert ("the run measured 99.00% and the student is right for" in capsys.readouterr().out) is said
    stated = read_metadata(tmp_path / "file.safetensors")
    assert int(stated["val_count"]) > 0, "where the run validated on a part, the accuracy is that of the check"


def test_export_tells_what_the_head_costs(capsys):
    assert main(["export", str(ATSC / "one"), "--out", "headed.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert f"{count_parameters(load_student('headed.safetensors')):,}" in shown
    assert "100.00%" in shown
    assert json.loads(read_metadata("headed.safetensors")["head"])["teachers"] == [[64, 4, 4]]


def test_the_adapted_teacher_is_in_the_checkpoint_and_the_file_is_as_it_was():
    state = torch.load(ATSC / "one/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    prefix = "method.teachers.0.network."
    adapted, first = create_model("resnet20", 10), create_model("resnet20", 10)
    adapted.load_state_dict({key.removeprefix(prefix): each for key, each in state.items() if key.startswith(prefix)})
    load_weights(first, "weights/digits_resnet20.safetensors")
    assert not torch.equal(adapted.conv1.weight, first.conv1.weight)
    torch.manual_seed(0)
    create_model("resnet8", 10)
    assert torch.equal(first.conv1.weight, create_model("resnet20", 10).conv1.weight)


@pytest.mark.parametrize(("learner", "name"), [(0, "resnet8"), (1, "resnet8"), (2, "resnet14")])
def test_any_classifier_of_acn_can_be_taken_out(learner, name, capsys):
    assert main(["export", str(ACN), "--learner", str(learner), "--out", f"{learner}.safetensors"]) == 0
    network = load_student(f"{learner}.safetensors")
    stated = read_metadata(f"{learner}.safetensors")
    assert stated["model"] == name
    assert stated.get("learner") == (f"{learner}, a peer of the student" if learner else None)
    assert f"exported {'peer' if learner else 'student'}" in capsys.readouterr().out
    assert count_parameters(network) == count_parameters(create_model(name, 10))
    module = DistillationModule.load_from_checkpoint(ACN / "checkpoints/last.ckpt", weights_only=True).eval()
    image = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        out = module.student(image)
        logits = [out.logits, *(branch.logits for branch in out.branches)]
        assert torch.allclose(logits[learner], network(image), atol=1e-5)
    column = f"val/aux{learner}_acc" if learner else "val/acc"
    said = float(read_metadata(f"{learner}.safetensors")["val_acc"])
    assert said == pytest.approx(json.loads((ACN / "summary.json").read_text())["last"][column], abs=1e-6)


@pytest.mark.parametrize(
    ("run", "learner", "choice"),
    [
        (ACN, "3", "use one of 0, 1, 2"),
        (ACN, "-1", "use one of 0, 1, 2"),
        (Path("runs/digits_resnet20_resnet8/a"), "1", "it has no peers"),
    ],
)
def test_what_is_no_network_of_its_own_is_not_exported(run, learner, choice, capsys):
    assert main(["export", str(run), "--learner", learner, "--out", "none.safetensors"]) == 2
    shown = capsys.readouterr().err
    assert f"--learner is {learner}" in shown
    assert choice in shown
    assert not Path("none.safetensors").exists()


@pytest.mark.parametrize("head", [{"a": 1}, {"channels": 64, "teachers": 5, "num_classes": 10}, {"channels": 64}])
def test_a_checkpoint_with_a_damaged_head_is_refused(tmp_path, head, capsys):
    checkpoint = torch.load(ATSC / "one/checkpoints/last.ckpt", weights_only=True)
    checkpoint["ackd_lightning"]["head"] = head
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    assert main(["export", str(tmp_path / "odd.ckpt"), "--out", "odd.safetensors"]) == 2
    assert "odd.ckpt" in capsys.readouterr().err


def test_a_file_cannot_ask_for_more_than_it_holds():
    many = {"model": "resnet8", "num_classes": "100000000000"}
    wide = {"channels": 10**12, "teachers": [[10**6, 4, 4]], "num_classes": 10}
    for metadata in (many, {"model": "resnet8", "num_classes": "10", "head": json.dumps(wide)}):
        save_file({"x": torch.zeros(1)}, "greedy.safetensors", metadata)
        with pytest.raises(ACKDError, match=r"greedy\.safetensors"):
            load_student("greedy.safetensors")


def test_a_network_with_a_head_says_how_it_is_loaded(capsys):
    path = ATSC / "one/student.safetensors"
    with pytest.raises(ACKDError, match=r"ATSC.*load_student"):
        load_weights(create_model("resnet8", 10), path)
    teacher = [*NO_GATE, "--model.teacher.network", "resnet8", "--model.teacher.weights", str(path)]
    assert main(["fit", "--config", "digits_resnet20_resnet8.yaml", "--name", "no", *QUICK, *teacher]) == 2
    assert "load_student" in capsys.readouterr().err


def test_all_that_learns_is_counted():
    summary = json.loads((ATSC / "one/summary.json").read_text())
    teacher = count_parameters(create_model("resnet20", 10))
    projector = summary["parameters"] - summary["plain_parameters"]  # the classifiers are of one size
    frozen = 64 * 10 + 10  # the student's own classifier
    assert summary["training_parameters"] == summary["plain_parameters"] - frozen + teacher + projector


def test_the_comparison_shows_every_classifier():
    table = compare([ACN])
    assert list(table.columns[2].cells) == ["resnet8", "resnet8 (learner 1)", "resnet14 (learner 2)"]
    sizes = [f"{count_parameters(create_model(name, 10)):,}" for name in ("resnet8", "resnet8", "resnet14")]
    assert list(table.columns[-1].cells) == sizes
    assert list(table.columns[0].cells) == [f"digits_resnet8_acn/{ACN.name}", "", ""]
    for column in (4, 6):  # validation and test of the last epoch
        values = list(table.columns[column].cells)
        assert len(values) == 3
        assert all(0 <= float(value) <= 100 for value in values)


def test_pictures_lie_in_the_run():
    assert [path.name for path in sorted((ACN / "examples").glob("*.png"))]


def test_a_plain_student_loads_in_the_same_way():
    student = load_student("runs/digits_resnet20_resnet8/a/student.safetensors")
    assert count_parameters(student) == count_parameters(create_model("resnet8", 10))


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"model": "resnet8"},
        {"model": "resnet8", "num_classes": "ten"},
        {"model": "resnet8", "num_classes": "10", "head": "{]"},
        {"model": "resnet8", "num_classes": "10", "head": '{"channels": 3}'},
    ],
    ids=["nothing", "no classes", "no number", "no JSON", "no head"],
)
def test_a_file_without_a_valid_description_is_refused(metadata):
    save_file({"x": torch.zeros(1)}, "foreign.safetensors", metadata)
    with pytest.raises(ACKDError, match=r"foreign\.safetensors"):
        load_student("foreign.safetensors")


@pytest.mark.parametrize(("accuracy", "said"), [(0.1, True), (0.9, False)])
def test_a_student_that_guesses_is_exported_with_a_word(monkeypatch, capsys, tmp_path, accuracy, said):
    recall = MeanRecall(accuracy, occurring=10, chance=0.1, deviation=0.01)
    monkeypatch.setattr("ackd_lightning.deploy.checking.CheckImages.accuracy", lambda *_: accuracy)
    monkeypatch.setattr("ackd_lightning.deploy.checking.mean_recall", lambda *_: recall)
    assert main(["export", "runs/digits_resnet20_resnet8/a", "--out", str(tmp_path / "a.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert f"the student is right for {accuracy:.2%} of" in shown
    assert ("which guessing could reach, too" in shown) is said
