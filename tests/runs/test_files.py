"""Files are written whole or not at all; damaged ones are refused with their names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.files import find_runs, read_checkpoint, read_summary, write_json
from ackd_lightning.writing import whole_file

METADATA = {
    "num_classes": 2,
    "input_size": 8,
    "mean": None,
    "std": None,
    "data": "",
    "method": "",
    "seed": 0,
    "epoch": 1,
}


def names(folder):
    return sorted(each.name for each in folder.iterdir())


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half():
        with whole_file(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json({"old": 1}, path)
    with pytest.raises(TypeError):
        write_json({"new": object()}, path)
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "new" / "a.txt", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    with whole_file(path) as partial:
        partial.write_text("new")
    assert seen == [False]
    assert path.read_text() == "new"


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json({}, tmp_path / "a.json")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_a_private_file_of_a_writer_is_no_more_private_than_others(tmp_path):
    (tmp_path / "usual").touch()
    with whole_file(tmp_path / "a.safetensors") as partial:
        save_file({"a": torch.zeros(2)}, partial)
        partial.chmod(0o600)
    modes = {each.stat().st_mode for each in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_process_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json("old", path)
    code = (
        "import os, signal, sys, pathlib\n"
        "from ackd_lightning.runs.files import write_json\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_json('new', pathlib.Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert json.loads(path.read_text()) == "old"


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"class_names": ["cat", "dog"]}, None),
        ({"class_names": ("cat", "dog")}, None),
        ({"class_names": None}, None),
        ({"class_names": ["cat"]}, "1 class names"),
        ({"class_names": ["cat", 7]}, "class_names"),
        ({"class_names": {"cat": 0}}, "class_names"),
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": 10**9}, "num_classes"),
        ({"input_size": "8"}, "input_size"),
        ({"learners": [1]}, "learners"),
        ({"head": [1]}, "head"),
    ],
    ids=str,
)
def test_metadata_of_a_checkpoint_is_checked(tmp_path, changes, word):
    path = tmp_path / "a.ckpt"
    torch.save({"ackd_lightning": {**METADATA, **changes}, "state_dict": {"a": torch.zeros(1)}}, path)
    if word is None:
        assert read_checkpoint(path)["ackd_lightning"]["num_classes"] == 2
    else:
        with pytest.raises(ACKDError, match=word):
            read_checkpoint(path)


@pytest.mark.parametrize("key", sorted(METADATA))
def test_metadata_that_is_missing_is_named(tmp_path, key):
    kept = {name: value for name, value in METADATA.items() if name != key}
    torch.save({"ackd_lightning": kept, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ACKDError, match=f"lacks {key}"):
        read_checkpoint(tmp_path / "a.ckpt")


# -------------------------------------------------------------------------------------------------------- summaries


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": "a"}', "[" * 100_000])
def test_a_damaged_summary_is_named(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ACKDError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_runs_are_found_once_however_they_are_named(tmp_path, monkeypatch):
    for name in ("b", "a"):
        write_json({}, tmp_path / "config" / name / "summary.json")
    runs = [tmp_path / "config" / name for name in ("a", "b")]
    assert find_runs([tmp_path, tmp_path / "config" / "a"]) == runs
    monkeypatch.chdir(runs[0])
    assert [each.resolve() for each in find_runs([".", runs[0], tmp_path])] == runs
    assert find_runs(["."])[0].name == "a"
    (tmp_path / "empty").mkdir()
    for place in ("empty", "gone"):
        with pytest.raises(ACKDError, match=place):
            find_runs([tmp_path / place])


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_another_process_wrote_meanwhile_is_kept(tmp_path, links, monkeypatch):
    def refuse(*places):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "weights"

    def write():
        with whole_file(target, replace=False) as partial:
            partial.write_text("ours")
            target.write_text("theirs")

    with pytest.raises(FileExistsError):
        write()
    assert (target.read_text(), names(tmp_path)) == ("theirs", ["weights"])
    target.unlink()
    with whole_file(target, replace=False) as partial:
        partial.write_text("ours")
    assert (target.read_text(), names(tmp_path)) == ("ours", ["weights"])
