"""``ackd fit --resume``: which run is resumed, from which checkpoint, and what is refused."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from threading import Timer

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from ackd_lightning.cli import main
from ackd_lightning.commands.compare import accuracies_on_test
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.preflight import check_checkpoint
from ackd_lightning.runs.claim import claim
from ackd_lightning.runs.resume import Length, changed_settings, resume_auto
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.types import DataInfo

ROOT = Path(__file__).parents[2]
CONFIG = "digits_resnet20.yaml"
SHORT = ["--data.max_per_class", "4", "--data.batch_size", "20", "--weights_dir", "null", "--trainer.max_epochs", "2"]
FIT = ["fit", "--config", CONFIG, *SHORT]
RUNS = Path("runs") / "digits_resnet20"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run ``a``."""
    place = tmp_path_factory.mktemp("finished")
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main([*FIT, "--name", "a"]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A copy of it, entered."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy


def unfinished(name: str = "a") -> Path:
    """Make a run look as if it had been killed after its last checkpoint."""
    run = RUNS / name
    (run / "summary.json").unlink()
    (run / "student.safetensors").unlink()
    return run


def state(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("value", ["auto", str(RUNS / "a"), str(RUNS / "a" / "checkpoints" / "last.ckpt")])
def test_an_unfinished_run_is_resumed_to_the_end_of_an_uninterrupted_one(place, capsys, value):
    assert main([*FIT, "--name", "whole", "--trainer.max_epochs", "3"]) == 0
    run = unfinished()
    capsys.readouterr()
    assert main([*FIT, "--resume", value, "--trainer.max_epochs", "3"]) == 0
    shown = capsys.readouterr().out
    assert str(run / "checkpoints" / "last.ckpt") in shown
    assert "trainer.max_epochs 2 -> 3" in shown
    whole, again = state(RUNS / "whole"), state(run)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert json.loads((run / "summary.json").read_text())["epochs"] == 3
    assert sorted(each.name for each in RUNS.iterdir()) == ["a", "whole"]


def test_a_summary_says_whether_its_accuracy_is_that_of_the_last_weights(place):
    longer = ["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"]
    assert main([*FIT, "--name", "odd", *longer]) == 0
    found = {name: json.loads((RUNS / name / "summary.json").read_text()) for name in ("a", "odd")}
    assert [found[name]["last_is_final"] for name in ("a", "odd")] == [True, False]
    assert found["odd"]["last"]["epoch"] == 2


@pytest.mark.parametrize("value", ["auto", str(RUNS / "a")])
def test_a_finished_run_says_so(place, capsys, value):
    assert main([*FIT, "--resume", value]) == 0
    shown = capsys.readouterr().out
    assert f"run {RUNS / 'a'} is finished (2 epochs)" in shown
    assert [each.name for each in RUNS.iterdir()] == ["a"]


@pytest.mark.parametrize("value", ["auto", str(RUNS / "a")])
def test_a_finished_run_is_trained_longer(place, capsys, value):
    schedule = ["--model.lr_scheduler", "CosineAnnealingLR"]
    assert main([*FIT, "--resume", value, "--trainer.max_epochs", "3", *schedule]) == 0
    assert json.loads((RUNS / "a" / "summary.json").read_text())["epochs"] == 3
    assert [each.name for each in RUNS.iterdir()] == ["a"]
    assert main([*FIT, "--resume", value, "--trainer.max_epochs", "3"]) == 0
    assert "is finished (3 epochs)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("now", "then", "longer"),
    [
        ((4, -1), (2, -1), True),
        ((2, -1), (2, -1), False),
        ((-1, 20), (-1, 10), True),
        ((1, -1), (2, -1), False),
        ((4, 5), (2, 10), False),
        ((None, -1), (2, -1), True),
        ((-1, -1), (None, -1), True),
    ],
)
def test_a_length_is_compared_with_that_of_the_run(now, then, longer):
    assert Length(*now).exceeds(Length(*then)) is longer


@pytest.mark.parametrize(
    ("time", "seconds"),
    [(None, math.inf), ("01:00:01:02", 86462.0), ({"minutes": 2}, 120.0), (timedelta(hours=1), 3600.0)],
)
def test_a_limit_of_time_is_read_in_each_of_its_forms(time, seconds):
    assert Length(4, max_time=time).exceeds(Length(4, max_time={"seconds": 1}))
    assert Length(4, -1, time)._limits() == (4.0, math.inf, seconds)


@pytest.mark.parametrize("time", ["01:00", "1h", "00:00:00:-1", "a:b:c:d", ""])
def test_a_limit_of_time_in_another_form_is_refused(time):
    with pytest.raises(ACKDError, match=rf"trainer.max_time is '{time}'; write days:hours:minutes:seconds"):
        Length(4, max_time=time).exceeds(Length(4))


@pytest.mark.parametrize(
    ("length", "setting"),
    [
        (Length(4), "max_epochs"),
        (Length(9, 20), "max_steps"),
        (Length(9, -1, "00:00:00:05"), "max_time"),
        (Length(4, -1, "00:00:00:05"), "max_epochs"),
        (Length(9), "max_epochs"),  # stopped early
    ],
)
def test_what_ended_a_run_is_named(length, setting):
    assert length.ended_by(4, 20) == setting


def test_a_run_that_its_time_ended_needs_more_of_it(place, capsys):
    limit = ["--trainer.max_time", "00:00:00:01"]
    assert main([*FIT, "--name", "timed", "--trainer.max_epochs", "500", *limit]) == 0
    run = RUNS / "timed"
    epochs = json.loads((run / "summary.json").read_text())["epochs"]
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs", "501"]) == 0
    assert "raise --trainer.max_time to train it longer" in capsys.readouterr().out
    last = str(run / "checkpoints" / "last.ckpt")
    assert main(["fit", "--resume", last, "--trainer.max_epochs", "501"]) == 0
    assert "nothing was left to train" in capsys.readouterr().out
    assert main(["fit", "--resume", str(run), "--trainer.max_time", "00:00:00:03"]) == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] > epochs


def test_auto_with_a_name_starts_that_run_and_leaves_others_alone(place, capsys):
    """What a job script needs: the same line starts the run and resumes it."""
    unfinished()
    before = (RUNS / "a" / "checkpoints" / "last.ckpt").read_bytes()
    assert main([*FIT, "--resume", "auto", "--name", "b"]) == 0
    assert (RUNS / "b" / "summary.json").is_file()
    assert (RUNS / "a" / "checkpoints" / "last.ckpt").read_bytes() == before


def test_auto_takes_the_newest_unfinished_run(place, capsys):
    shutil.copytree(unfinished(), RUNS / "older")
    shutil.copytree(RUNS / "a", RUNS / "newest")
    for number, name in enumerate(("older", "a", "newest")):
        for each in (RUNS / name / "checkpoints").iterdir():
            os.utime(each, (1_700_000_000 + number, 1_700_000_000 + number))
    assert main([*FIT, "--resume", "auto", "--trainer.max_epochs", "3"]) == 0
    assert (RUNS / "newest" / "summary.json").is_file()
    assert not (RUNS / "a" / "summary.json").exists()


def test_auto_leaves_runs_with_another_seed_alone(place, capsys):
    """An array of jobs, one for each seed, must not resume each other's runs."""
    before = (unfinished() / "checkpoints" / "last.ckpt").read_bytes()
    assert main([*FIT, "--resume", "auto", "--seed_everything", "1"]) == 0
    assert len(list(RUNS.iterdir())) == 2
    assert (RUNS / "a" / "checkpoints" / "last.ckpt").read_bytes() == before
    assert f"nothing to resume with seed 1; unfinished with another: {RUNS / 'a'} (0)" in capsys.readouterr().out


def test_another_seed_is_refused(place, capsys):
    run = unfinished()
    assert main([*FIT, "--resume", str(run), "--seed_everything", "1"]) == 2
    assert "--seed_everything 0 and not 1" in capsys.readouterr().err


def test_other_data_are_refused(tmp_path):
    for name in ("run", "first", "second"):
        (tmp_path / name).mkdir()
    before, now = ({"seed_everything": 0, "data": {"root": str(tmp_path / each)}} for each in ("first", "second"))
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(before))
    assert changed_settings(tmp_path / "run", before, before) == []
    with pytest.raises(ACKDError, match=r"has --data.root .*first and not .*second"):
        changed_settings(tmp_path / "run", before, now)
    (tmp_path / "first").rmdir()
    assert changed_settings(tmp_path / "run", before, now) == []


def test_two_processes_cannot_train_one_run(place, capsys):
    run = unfinished()
    before = (run / "checkpoints" / "last.ckpt").read_bytes()
    with (run / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main([*FIT, "--resume", "auto"]) == 2
        assert f"{run} is being trained by another process; wait" in capsys.readouterr().err
        assert main([*FIT, "--name", run.name]) == 2
        assert f"{run} is being trained by another process; wait" in capsys.readouterr().err
        assert main(["inspect", str(run)]) == 0
        assert f"{run} is being trained by another process, so this is its network so far\n" in capsys.readouterr().out
    assert (run / "checkpoints" / "last.ckpt").read_bytes() == before


def test_a_run_that_is_only_looked_at_can_be_resumed(place):
    run = unfinished()
    with (run / ".lock").open() as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        Timer(0.02, fcntl.flock, (look, fcntl.LOCK_UN)).start()
        with claim(run.parent, run.name, resume=True) as mine:
            assert mine.folder == run


def test_a_checkpoint_outside_a_run_is_refused(place, capsys):
    shutil.copy(unfinished() / "checkpoints" / "last.ckpt", "elsewhere.ckpt")
    assert main([*FIT, "--resume", "elsewhere.ckpt"]) == 2
    assert "elsewhere.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        (["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"], (4, 6)),
        (["--trainer.max_epochs", "1", "--data.max_per_class", "6", "--trainer.val_check_interval", "2"], (2, 3)),
    ],
    ids=["epochs", "steps"],
)
def test_last_is_measured_when_the_fit_ends_between_two_validations(place, capsys, options, measured):
    """Without validation data a run's figure is that of its last weights, and no warning is about our callbacks."""
    average = ["--model.recipe.ema_decay", "0.9"]
    assert main([*FIT, "--name", "between", "--data.val_fraction", "0", *options, *average, "--test"]) == 0
    summary = json.loads((RUNS / "between" / "summary.json").read_text())
    assert (summary["measured_at"], summary["steps"]) == measured
    assert accuracies_on_test([summary], "last") == [summary["test"]["last"]["test/acc"]]
    assert accuracies_on_test([{**summary, "test": {}}], "last") == []  # those of earlier weights
    said = capsys.readouterr()
    assert "WeightAveraging" not in said.out + said.err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])
    os.utime(path, None)  # the newest


def test_auto_passes_over_a_cut_off_checkpoint_and_says_so(place, capsys):
    run = unfinished()
    shutil.copy(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")
    cut(run / "checkpoints" / "last.ckpt")
    assert main([*FIT, "--resume", "auto", "--trainer.max_epochs", "3"]) == 0
    shown = capsys.readouterr().out
    assert "runs/digits_resnet20/a/checkpoints/best.ckpt" in shown
    assert "last.ckpt cannot be read" in shown


def test_a_named_checkpoint_that_is_cut_off_is_refused_with_a_better_one(place, capsys):
    last = unfinished() / "checkpoints" / "last.ckpt"
    cut(last)
    assert main([*FIT, "--resume", str(last)]) == 2
    shown = capsys.readouterr().err
    assert "last.ckpt cannot be read" in shown
    assert "such as --resume runs/digits_resnet20/a/checkpoints/best.ckpt" in shown


def test_a_foreign_checkpoint_is_refused(place, capsys):
    torch.save({"epoch": 3, "state_dict": {}}, "other.ckpt")
    assert main([*FIT, "--resume", "other.ckpt"]) == 2
    assert "other.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--resume", "gone"], "gone"),
        (["--resume", "auto", "--ckpt_path", "x.ckpt"], "--ckpt_path"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_sentence(place, capsys, more, words):
    assert main([*FIT, *more]) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1


def test_a_run_that_is_killed_at_a_random_moment_ends_like_one_that_is_not(place):
    """SIGKILL leaves no time to write anything; what counts is the last whole checkpoint."""
    longer = ["--trainer.max_epochs", "9"]
    assert main([*FIT, *longer, "--name", "whole"]) == 0
    command = [sys.executable, "-m", "ackd_lightning", *FIT, *longer, "--name", "killed"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet)
    shown = []
    for line in child.stdout:
        shown.append(line)
        if line.startswith("epoch 2/"):
            break
    delay = random.SystemRandom().uniform(0.0, 0.1)
    time.sleep(delay)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "".join(shown)
    assert not (RUNS / "killed" / "summary.json").exists()
    assert main([*FIT, *longer, "--resume", "auto", "--name", "killed"]) == 0
    whole, again = state(RUNS / "whole"), state(RUNS / "killed")
    assert all(torch.equal(whole[key], again[key]) for key in whole), f"after {delay:.3f} s"


@pytest.mark.slow
def test_a_real_run_that_is_killed_twice_ends_like_one_that_is_not():
    """SIGKILL and SIGTERM at random moments, with a teacher; ``--times 20`` of the same script is the long version."""
    script = ROOT / "benchmarks" / "kill_and_resume.py"
    seed = str(int.from_bytes(os.urandom(2), "big"))
    done = subprocess.run(
        [sys.executable, str(script), "--times", "1", "--seed", seed],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.stdout.endswith("1 of 1\n"), f"--seed {seed}: {done.stdout}{done.stderr}"


def test_a_checkpoint_is_read_once_before_it_is_loaded(place, monkeypatch):
    """Once to find the newest whole one and to compare it with the networks, and once by Lightning."""
    unfinished()
    read, load = [], torch.load

    def counting(path, *args, **options):
        read.append(Path(str(getattr(path, "name", path))).name)
        return load(path, *args, **options)

    monkeypatch.setattr(torch, "load", counting)
    resumed = resume_auto(RUNS, "a")
    assert read == ["last.ckpt"]
    assert resumed.content["epoch"] == 1
    check_checkpoint(resumed.checkpoint, DistillationModule("resnet20", data=DataInfo(10)), resumed.content)
    assert read == ["last.ckpt"]


def test_only_the_first_process_claims_the_folder(place, monkeypatch):
    """With torchrun every process reads the same command line; the others must not be refused."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with claim(RUNS, "b"):  # by the first process
        assert main([*FIT, "--name", "b", "--trainer.max_epochs", "1"]) == 0


@pytest.mark.slow
def test_two_machines_by_torchrun(place):
    """Two launchers on this machine act as two machines."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launch += ["--master-addr", "localhost", "--master-port", str(port)]
    fit = ["-m", "ackd_lightning", *FIT, "--name", "nodes", "--trainer.accelerator", "cpu"]
    fit += ["--trainer.devices", "1", "--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]
    children = [
        subprocess.Popen(
            [*launch, "--node-rank", str(rank), *fit],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(2)
    ]
    try:
        shown = [child.communicate(timeout=200)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], shown[0][-2000:] + shown[1][-2000:]
    summary = json.loads((RUNS / "nodes" / "summary.json").read_text())
    assert summary["steps"] == 4
    one, two = state(RUNS / "a"), state(RUNS / "nodes")
    learnt = [key for key in one if key.endswith("fc.weight")]
    assert learnt
    assert all(torch.isfinite(two[key]).all() for key in learnt)


@pytest.mark.slow  # tests/callbacks/test_predictions.py has the part that joins the rows of both
def test_two_processes_predict_into_one_file(place):
    """The file of one process, line by line: every image once, in order."""
    assert main(["predict", str(RUNS / "a"), "--output", "one.csv", "--trainer.enable_progress_bar", "false"]) == 0
    two = ["predict", str(RUNS / "a"), "--output", "two.csv", "--trainer.enable_progress_bar", "false"]
    two += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, "-m", "ackd_lightning", *two],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (list(csv.DictReader(Path(name).read_text().splitlines())) for name in ("one.csv", "two.csv"))
    keys = ("index", "target", "prediction")
    assert [[row[key] for key in keys] for row in one] == [[row[key] for key in keys] for row in other]
    for row, again in zip(one, other, strict=True):
        assert float(row["probability"]) == pytest.approx(float(again["probability"]), abs=1e-5)
