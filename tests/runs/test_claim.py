"""A run's folder belongs to one process, and nobody else removes it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ackd_lightning.cli import main
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs import claim as module
from ackd_lightning.runs.claim import claim

WORKER = Path(__file__).with_name("claim_worker.py")
STAMP = "20250131-235959"
FIT = ["fit", "--config", "digits_resnet20.yaml", "--data.max_per_class", "4", "--data.batch_size", "20"]
FIT += ["--weights_dir", "null", "--trainer.max_epochs", "1"]
RUNS = Path("runs") / "digits_resnet20"


def race(parent: Path, *, processes: int, rounds: int, mode: str) -> list[str]:
    """Output of processes that claim folders at the same time."""
    command = [sys.executable, str(WORKER), str(parent), str(rounds), mode]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    try:
        shown = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * processes, [errors for _, errors in shown]
    return [output for output, _ in shown]


@pytest.fixture
def same_second(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: STAMP)


def test_only_one_process_is_in_a_named_folder_and_the_others_remove_nothing(tmp_path):
    entered = race(tmp_path / "runs" / "config", processes=3, rounds=3000, mode="named")
    assert all(int(each) > 0 for each in entered)
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.name.startswith(".run")]
    assert left == []  # what was renamed was removed


def test_a_folder_above_that_is_removed_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """`Path.mkdir` looks twice, and between the two another process may remove what it found first."""
    mkdir, removed = Path.mkdir, []

    def removed_once(self, *arguments, **options):
        if options.get("exist_ok") and not removed:
            removed.append(self)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", removed_once)
    with claim(tmp_path / "runs" / "config", "a") as mine:
        assert mine.made
    assert removed == [tmp_path / "runs" / "config"]


@pytest.mark.parametrize("place", ["file", "link"])
def test_what_is_no_folder_above_is_refused_and_stays(place, tmp_path):
    above = tmp_path / "runs"
    if place == "file":
        above.write_text("text")
    else:
        above.symlink_to(tmp_path / "nowhere")
    for parent in (above, above / "config"):
        with pytest.raises(ACKDError, match="cannot be written"):
            claim(parent, "a")
    assert os.path.lexists(above)


def test_processes_without_a_name_get_a_folder_each(tmp_path):
    names = " ".join(race(tmp_path / "runs" / "config", processes=3, rounds=40, mode="unnamed")).split()
    assert sorted(names) == sorted([STAMP, *(f"{STAMP}-{number}" for number in range(2, 121))])


def test_a_second_claim_is_refused_and_changes_nothing(tmp_path):
    with claim(tmp_path / "runs", "a") as first:
        (first.folder / "config.yaml").write_text("text")
        with pytest.raises(ACKDError, match=str(first.folder)):
            claim(tmp_path / "runs", "a")
        assert first.held
        assert sorted(each.name for each in first.folder.iterdir()) == [".lock", "config.yaml"]


def test_a_claim_without_a_name_passes_over_folders_that_exist(tmp_path, same_second):
    (tmp_path / STAMP).mkdir()
    with claim(tmp_path) as second, claim(tmp_path) as third:
        assert [second.folder.name, third.folder.name] == [f"{STAMP}-2", f"{STAMP}-3"]
        assert second.made
        assert third.made


def test_an_empty_folder_is_removed_with_the_parents_that_were_made(tmp_path):
    with claim(tmp_path / "runs" / "config", "a"):
        assert (tmp_path / "runs" / "config" / "a" / ".lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_discard_removes_what_was_written_before_the_first_checkpoint(tmp_path):
    mine = claim(tmp_path / "runs", "a")
    (mine.folder / "wandb").mkdir()
    (mine.folder / "wandb" / "log").write_text("text")
    mine.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("result", ["summary.json", "checkpoints/last.ckpt"])
def test_results_are_never_removed(tmp_path, result):
    mine = claim(tmp_path, "a")
    path = mine.folder / result
    path.parent.mkdir(exist_ok=True)
    path.write_text("text")
    mine.discard()
    assert path.read_text() == "text"
    (mine.folder / ".lock").unlink()
    with pytest.raises(ACKDError, match=str(mine.folder)):
        claim(tmp_path, "a")
    assert not (mine.folder / ".lock").exists()  # nothing is written into a run that is refused
    claim(tmp_path, "a", resume=True).discard()
    assert path.read_text() == "text"


@pytest.mark.parametrize(("finished", "advice"), [(False, "continue it with --resume"), (True, "remove the folder")])
def test_the_refusal_of_a_name_knows_whether_the_run_has_finished(tmp_path, finished, advice):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "last.ckpt").write_text("weights")
    if finished:
        (tmp_path / "a" / "summary.json").write_text("{}")
    with pytest.raises(ACKDError, match=advice):
        claim(tmp_path, "a")


def test_a_folder_that_another_process_made_is_kept(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes").write_text("text")
    mine = claim(tmp_path, "a")
    assert not mine.made
    mine.discard()
    assert (tmp_path / "a" / "notes").read_text() == "text"
    with claim(tmp_path, "a"):  # and it is free again
        pass


def test_a_folder_that_was_made_anew_by_another_process_is_kept(tmp_path):
    """A user removed the folder of a running fit, and started a second one with its name."""
    first = claim(tmp_path, "a")
    (first.folder / ".lock").unlink()
    first.folder.rmdir()
    with claim(tmp_path, "a") as second:
        (second.folder / "notes").write_text("text")
        assert not first.held
        first.discard()
        assert (second.folder / "notes").read_text() == "text"
        assert second.held


def test_a_folder_that_is_made_anew_during_the_removal_is_kept(tmp_path, monkeypatch):
    mine, remove, others = claim(tmp_path, "a"), shutil.rmtree, []
    (mine.folder / "config.yaml").write_text("mine")

    def remove_after_another_process_came(path, **options):
        others.append(claim(tmp_path, "a"))
        (tmp_path / "a" / "config.yaml").write_text("another's")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", remove_after_another_process_came)
    mine.discard()
    assert (tmp_path / "a" / "config.yaml").read_text() == "another's"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert others[0].held
    others[0].release()


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    """On Windows, and on network file systems without locks."""
    monkeypatch.setattr(module, "_locked", lambda _: None)
    with claim(tmp_path, "a") as mine:
        assert mine.made
        assert not mine.held
    assert mine.folder.is_dir()
    mine.discard()
    assert mine.folder.is_dir()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ACKDError, match="file"):
        claim(tmp_path / "file" / "config", "a")
    with pytest.raises(ACKDError, match="file"):
        claim(tmp_path, "file")


# ------------------------------------------------------------------------------------------------- by the command


def test_a_fit_with_the_name_of_a_run_that_has_just_started_is_refused(tmp_path, monkeypatch, capsys):
    """The first one has no checkpoint yet, so nothing but the lock tells that it is there."""
    monkeypatch.chdir(tmp_path)
    with claim(RUNS, "a") as first:
        (first.folder / "config.yaml").write_text("text")
        assert main([*FIT, "--name", "a"]) == 2
        assert str(first.folder) in capsys.readouterr().err
        assert first.held
        assert sorted(each.name for each in first.folder.iterdir()) == [".lock", "config.yaml"]


def test_a_fit_without_a_name_in_the_same_second_gets_another_folder(tmp_path, monkeypatch, same_second):
    monkeypatch.chdir(tmp_path)
    with claim(RUNS) as first:
        assert main(FIT) == 0
        assert [each.name for each in first.folder.iterdir()] == [".lock"]
        assert (RUNS / f"{STAMP}-2" / "summary.json").is_file()
    assert [each.name for each in RUNS.iterdir()] == [f"{STAMP}-2"]


@pytest.mark.parametrize(
    "mistake",
    [["--data.batch_size", "0"], ["--trainer.devices", "nonsense"], ["--data.val_fraction", "7"]],
    ids=["data", "trainer", "fraction"],
)
def test_a_mistake_in_the_input_leaves_no_folder(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--name", "a", *mistake]) == 2
    assert not Path("runs").exists()
