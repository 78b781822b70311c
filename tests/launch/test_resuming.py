"""A run that is resumed: what a refusal leaves alone, and what is written when nothing is left to train."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ackd_lightning import DistillationModule
from ackd_lightning.cli import main
from ackd_lightning.launch.arguments import renew_length
from ackd_lightning.launch.execute import Execution
from ackd_lightning.models.weights import read_metadata
from ackd_lightning.runs.figures import read_metrics

FIT = ["fit", "--config", "digits_resnet8.yaml", "--data.max_per_class", "4", "--trainer.accelerator", "cpu"]
FIT += ["--trainer.enable_progress_bar", "false", "--name", "one"]
REFUSED = {
    "other groups": ["--model.recipe.decay_norm_and_bias", "false"],
    "other optimizer": ["--model.optimizer", "AdamW"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resuming")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FIT, "--trainer.max_epochs", "1"]) == 0
        yield folder / "runs/digits_resnet8/one"


@pytest.mark.parametrize("others", REFUSED.values(), ids=REFUSED)
def test_a_refused_resume_leaves_settings_and_summary_alone(run, others, capsys):
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "summary.json", "student.safetensors")}
    assert main([*FIT, "--resume", str(run), "--trainer.max_epochs", "2", *others]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {name: (run / name).read_bytes() for name in before} == before


def test_another_batch_size_within_an_epoch_is_refused_and_leaves_the_run_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = [*FIT, "--config", "ce", "--weights_dir", "null", "--trainer.max_epochs", "1"]
    assert main([*plain, "--data.batch_size", "8", "--trainer.max_steps", "2"]) == 0
    run = tmp_path / "runs/digits_resnet8+ce/one"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "-1", "--data.batch_size", "16"]) == 2
    assert "after batch 2 of epoch 1" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["fit", "--resume", str(run), "--trainer.max_steps", "-1"]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 5


def test_a_run_that_has_trained_longer_is_refused_in_the_words_of_the_command(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    longer = tmp_path / "runs/digits_resnet8/one"
    shutil.copytree(run, longer)
    assert main([*FIT, "--resume", str(longer), "--trainer.max_epochs", "3"]) == 0
    (longer / "summary.json").unlink()
    capsys.readouterr()
    assert main([*FIT, "--resume", str(longer), "--trainer.max_epochs", "2"]) == 2
    assert "has trained 3 epochs and --trainer.max_epochs is 2; give 3 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "words", "follows"),
    [
        (["--model.lr_scheduler", "null"], "model.lr_scheduler 'torch.optim.lr_scheduler.MultiStepLR' -> None", True),
        (["--data.eval_batch_size", "7"], "data.eval_batch_size 256 -> 7", False),
    ],
    ids=["schedule", "data"],
)
def test_what_a_resumed_run_has_otherwise_is_said(run, tmp_path, monkeypatch, capsys, option, words, follows):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, folder := tmp_path / "runs/digits_resnet8/one")
    (folder / "summary.json").unlink()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("max_epochs: 1\n", "max_epochs: 2\n"))  # as if it was interrupted
    assert main([*FIT, "--resume", str(folder), "--trainer.max_epochs", "2", *option]) == 0
    shown = capsys.readouterr().out
    assert words in shown
    assert ("the learning rate follows the new schedule" in shown) == follows


@pytest.mark.parametrize(("name", "value"), [("lr", "0.0001"), ("weight_decay", "0.5")])
def test_another_argument_of_the_optimizer_is_refused_and_leaves_the_record_alone(run, name, value, capsys):
    before = (run / "config.yaml").read_bytes()
    resume = ["--resume", str(run), "--trainer.max_epochs", "2", f"--model.optimizer.{name}", value]
    assert main([*FIT, *resume]) == 2
    said = capsys.readouterr().err
    assert f"--model.optimizer.{name}" in said
    assert "--model.student.weights" in said
    assert (run / "config.yaml").read_bytes() == before


def test_a_run_that_was_stopped_after_its_last_epoch_gets_its_summary(run):
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    (run / "student.safetensors").unlink()
    Path("weights/digits_resnet8.safetensors").unlink()
    assert main([*FIT, "--resume", str(run), "--trainer.max_epochs", "1"]) == 0
    after = json.loads((run / "summary.json").read_text())
    assert (run / "student.safetensors").is_file()
    for key in ("epochs", "last", "best", "images"):
        assert after[key] == before[key]


def test_so_does_one_that_ended_inside_an_epoch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = [*FIT, "--trainer.max_epochs", "9", "--trainer.max_steps", "7", "--data.batch_size", "8"]
    assert main(steps) == 0
    summary = Path("runs/digits_resnet8/one/summary.json")
    before = json.loads(summary.read_text())
    assert (before["epochs"], before["images"]) == (2, {"val": 126})
    summary.unlink()
    assert main([*steps, "--resume", "runs/digits_resnet8/one"]) == 0
    after = json.loads(summary.read_text())
    assert {key: after[key] for key in ("epochs", "steps", "images", "last")} == {
        key: before[key] for key in ("epochs", "steps", "images", "last")
    }


def test_weights_of_another_run_are_kept_when_a_run_is_resumed(run, tmp_path, monkeypatch, capsys):
    first, here = tmp_path / "first", tmp_path / "here"
    moved = first / "runs/digits_resnet8/one"
    shutil.copytree(run, moved)
    own, other = (each / "weights/digits_resnet8.safetensors" for each in (first, here))
    for file in (own, other):
        file.parent.mkdir(parents=True)
    shutil.copy(run / "student.safetensors", own)
    other.write_bytes(b"of another run")
    monkeypatch.chdir(here)
    assert main(["fit", "--resume", str(moved), "--trainer.max_epochs", "2"]) == 0
    assert f"weights_dir is {first / 'weights'}" in capsys.readouterr().out
    assert (
        own.read_bytes() == (moved / "student.safetensors").read_bytes() != (run / "student.safetensors").read_bytes()
    )
    assert other.read_bytes() == b"of another run"
    own.write_bytes(b"of a third one")
    assert main(["fit", "--resume", str(moved), "--trainer.max_epochs", "3"]) == 2
    assert f"weights {own} exist" in capsys.readouterr().err
    assert own.read_bytes() == b"of a third one"
    assert main(["fit", "--resume", str(moved), "--trainer.max_epochs", "3", "--weights_dir", "new"]) == 0
    assert Path("new/digits_resnet8.safetensors").is_file()


@pytest.mark.parametrize(
    ("folder", "value"), [(".", "."), ("checkpoints", ".."), ("checkpoints", "last.ckpt"), ("..", "one")]
)
def test_a_run_is_resumed_and_tested_from_a_folder_inside_it(run, tmp_path, monkeypatch, capsys, folder, value):
    moved = tmp_path / "runs/digits_resnet8/one"
    shutil.copytree(run, moved)
    monkeypatch.chdir(moved / folder)
    assert main(["test", value]) == 0
    assert "test" in json.loads((moved / "summary.json").read_text())
    assert main(["fit", "--resume", value, "--trainer.max_epochs", "2"]) == 0
    assert json.loads((moved / "summary.json").read_text())["epochs"] == 2
    assert max(read_metrics(moved / "metrics.csv")["val/acc"]) == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["runs", "weights"]


@pytest.mark.parametrize("option", [["--name", "two"], ["--name=two"], ["--runs_dir", "elsewhere"]])
def test_a_run_that_is_resumed_keeps_its_place(run, capsys, option):
    before = (run / "config.yaml").read_bytes()
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2", *option]) == 2
    assert f"the run that is resumed is {run}" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_what_is_no_run_is_answered_with_the_run(run, capsys):
    own = run.relative_to(Path.cwd())
    for value, words in {
        "runs": f"has the runs {own}",
        own.parent: f"has the runs {own}",
        own / "checkpoints": f"name the run {own}",
        own / "config.yaml": f"name the run {own}",
    }.items():
        for command in (["test", str(value)], ["export", str(value)], ["fit", "--resume", str(value)]):
            assert main(command) == 2
            error = capsys.readouterr().err
            assert words in error
            assert "--which" not in error


def test_what_was_measured_is_kept_until_there_is_a_new_checkpoint(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "one")
    run = tmp_path / "one"
    monkeypatch.chdir(run.parents[0])
    assert main(["test", str(run)]) == 0

    def kept():
        files = (run / "summary.json", run / "checkpoints/last.ckpt", *(run / "predictions").iterdir())
        return {file.name: file.read_bytes() for file in files}

    def fail(*_):
        raise RuntimeError("out of memory")

    before = kept()
    assert len(before) == 3
    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "training_step", fail)
        assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2", "--weights_dir", "null"]) != 0
    assert kept() == before


def test_two_tests_of_one_run_keep_both_results(tmp_path):
    """The other test ends while this one writes its predictions."""
    path = tmp_path / "summary.json"
    path.write_text("{}")

    class Answers:
        def write(self, *_):
            path.write_text('{"test": {"last": {"test/acc": 0.5}}}')

    execution = object.__new__(Execution)
    execution.trainer = SimpleNamespace(is_global_zero=True, callback_metrics={"test/acc": 0.25})
    execution._answers = lambda: [Answers()]
    execution._keep_test(tmp_path / "checkpoints/best.ckpt")
    tested = json.loads(path.read_text())["test"]
    assert {which: values["test/acc"] for which, values in tested.items()} == {"last": 0.5, "best": 0.25}


def test_a_finished_run_that_was_not_tested_says_so(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "one")
    summary = json.loads((tmp_path / "one/summary.json").read_text())
    summary.pop("test", None)
    (tmp_path / "one/summary.json").write_text(json.dumps(summary))
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--resume", "one", "--test"]) == 0
    assert "was not tested; raise --trainer.max_epochs" in (said := capsys.readouterr().out)
    assert "`ackd test one` to measure it" in said
    (tmp_path / "one/summary.json").write_text("{")
    assert main(["fit", "--resume", "one"]) == 2
    assert "summary.json" in capsys.readouterr().err


def test_a_run_that_stopped_early_keeps_its_results_and_says_what_to_raise(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stopping = ["--model.recipe.early_stopping", "1", "--model.optimizer.lr", "1e-12"]  # no validation is better
    assert main([*FIT, "--trainer.max_epochs", "6", *stopping]) == 0
    run = tmp_path / "runs/digits_resnet8/one"
    assert main(["test", str(run)]) == 0
    before = json.loads((run / "summary.json").read_text())
    assert before["epochs"] == 2
    capsys.readouterr()
    assert main(["fit", "--resume", str(run), "--model.recipe.early_stopping", "5"]) == 0
    assert "raise --trainer.max_epochs and --model.recipe.early_stopping to train it longer" in capsys.readouterr().out
    predictions = sorted((run / "predictions").iterdir())
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "7"]) == 0
    assert json.loads((run / "summary.json").read_text())["test"] == before["test"]
    assert sorted((run / "predictions").iterdir()) == predictions
    longer = ["--trainer.max_epochs", "8", "--model.recipe.early_stopping", "5"]
    assert main(["fit", "--resume", str(run), *longer]) == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] > 2
    assert "test" not in json.loads((run / "summary.json").read_text())


def test_a_full_disk_leaves_what_was_measured_before_a_run_is_trained_longer(run, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    run = Path(shutil.copytree(run, tmp_path / "runs/digits_resnet8/one"))
    assert main(["test", str(run)]) == 0
    before = {path: path.read_bytes() for path in [run / "summary.json", *(run / "predictions").iterdir()]}
    with monkeypatch.context() as patch:
        patch.setattr("ackd_lightning.writing.os.fsync", full)
        assert main([*FIT, "--resume", str(run), "--trainer.max_epochs", "2"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert main([*FIT, "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    assert "test" not in json.loads((run / "summary.json").read_text())


def test_commands_on_an_unfinished_run_say_so(run, capsys):
    summary, outdated = run / "summary.json", run / "student-last.onnx"
    content = summary.read_text()
    summary.unlink()
    for command in (["test"], ["inspect"], ["export", "--out", "early.safetensors"], ["report", "--no-latency"]):
        assert main([command[0], str(run), *command[1:]]) == 0
        assert f"{run} has not finished" in capsys.readouterr().out
    outdated.write_text("an earlier export")
    os.utime(outdated, (0, 0))
    assert main([*FIT, "--resume", str(run), "--trainer.max_epochs", "1"]) == 0
    assert f"{outdated} was exported before the run ended" in capsys.readouterr().out
    outdated.unlink()
    assert main(["test", str(run)]) == 0
    assert "finished" not in capsys.readouterr().out
    summary.write_text(content)


def test_a_run_goes_on_with_its_own_settings_and_leaves_no_trace_of_it_in_them(run, tmp_path, monkeypatch):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert main(["test", str(run)]) == 0
    assert [each.name for each in (run / "predictions").iterdir()] == ["test-last.safetensors"]
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "2"]) == 0
    settings["trainer"]["max_epochs"] = 2
    assert not any((run / "predictions").iterdir())  # those of the weights before
    assert yaml.safe_load((run / "config.yaml").read_text()) == settings
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2
    for file in (run / "student.safetensors", run.parents[2] / "weights/digits_resnet8.safetensors"):
        assert read_metadata(file)["epochs"] == "2"
    settings["ckpt_path"] = "start.ckpt"  # of a run that started from another one's weights
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    last = run / "checkpoints/last.ckpt"
    assert main(["fit", "--resume", str(last), "--trainer.max_epochs", "3", "--weights_dir", "null"]) == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] == 3
    assert not (tmp_path / "runs").exists()


def test_a_run_that_does_not_exist_is_named_with_the_nearest_one(run, capsys):
    assert main(["fit", "--resume", str(run.with_name("onne"))]) == 2
    assert "did you mean 'one'?" in capsys.readouterr().err
    assert main(["fit", "--resume", str(run), "--model.student", "resnet20", "--trainer.max_epochs", "9"]) == 2
    assert "leave out what differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "interval", "said"), [(-1, "epoch", True), (10, "epoch", False), (-1, "step", False)]
)
def test_only_a_schedule_that_ends_before_the_fit_is_told_of(steps, interval, said):
    scheduler = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 3}}
    found = renew_length(scheduler, before=None, epochs=4, steps=steps, options=[], interval=interval)
    assert ("rises again after epoch 3" in found) is said
    assert not renew_length(scheduler, before=None, epochs=3, steps=steps, options=[], interval=interval)
    found = renew_length(scheduler, before=None, epochs=2, steps=steps, options=[], interval=interval)
    assert ("does not fall to the end; --model.lr_scheduler.T_max 2" in found) is said


@pytest.mark.parametrize(
    ("options", "length"),
    [(["--trainer.max_steps", "10"], 0), ([], 4), (["--trainer.max_steps=10", "--model.lr_scheduler.T_max=4"], 4)],
)
def test_a_schedule_of_the_length_of_the_fit_follows_its_steps(options, length):
    scheduler = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 4}}
    found = renew_length(scheduler, before=4, epochs=4, steps=10, options=options, interval="epoch")
    assert scheduler["init_args"]["T_max"] == length
    assert ("follows trainer.max_steps: 4 -> the epochs of 10 steps" in found) is (length == 0)


def test_a_cycle_needs_its_length_where_steps_limit_the_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cycle = ["--model.lr_scheduler", "OneCycleLR", "--model.lr_scheduler.max_lr", "0.1", "--trainer.max_steps", "10"]
    assert main(["fit", "--config", "digits_resnet8.yaml", *cycle]) == 2
    said = capsys.readouterr().err
    assert "total_steps is not set" in said
    assert "trainer.max_steps is 10" in said


@pytest.mark.parametrize("stated", [None, 3])
def test_a_schedule_of_the_length_of_the_fit_follows_it(run, tmp_path, monkeypatch, capsys, stated):
    """The settings of a run hold the length that its schedule had; a longer fit would otherwise climb again."""
    monkeypatch.chdir(tmp_path)
    cosine = ["--model.lr_scheduler", "CosineAnnealingLR", *([f"--model.lr_scheduler.T_max={stated}"] * bool(stated))]
    arguments = ["fit", "--config", "digits_resnet8.yaml", "--name", "one", "--trainer.enable_progress_bar", "false"]
    assert main([*arguments, *cosine, "--trainer.max_epochs", "2"]) == 0
    assert main(["fit", "--resume", "runs/digits_resnet8/one", "--trainer.max_epochs", "4"]) == 0
    settings = yaml.safe_load(Path("runs/digits_resnet8/one/config.yaml").read_text())
    assert settings["model"]["lr_scheduler"]["init_args"]["T_max"] == (stated or 4)
    shown = capsys.readouterr().out
    assert ("T_max follows trainer.max_epochs: 2 -> 4" in shown) is (stated is None)
    rises = "T_max is 3 and the fit has 4 epochs, so the learning rate rises again after epoch 3"
    assert (rises in shown) is bool(stated)
    rates = read_metrics(Path("runs/digits_resnet8/one/metrics.csv"))["lr/student"]
    if stated is None:
        assert rates[4] < rates[3] <= rates[2]
