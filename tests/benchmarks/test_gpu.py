"""The program benchmarks/gpu.py: its record, archives, and what it makes of results. Nothing is measured here."""

from __future__ import annotations

import json
import signal
import tarfile
from pathlib import Path

import gpu
import pytest
from rented import packing, speed_parts, training_parts
from rented.goals import goals
from rented.record import LAST, Record, Task
from timing.machine import busy_share


class Clock:
    """A clock that only tasks move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def task(name: str, clock: Clock, seconds: float = 10.0, *, estimate: float = 5.0, finished: bool = True) -> Task:
    def run(left: float) -> dict:
        clock.now += seconds
        return {"left": left, **({} if finished else {"finished": False})}

    return Task(1, name, "kind", estimate, run)


def broken(left: float) -> dict:
    raise RuntimeError("no such card")


def test_what_is_done_is_kept_and_what_does_not_fit_is_left(tmp_path):
    clock = Clock()
    record = Record(tmp_path, minutes=(60 + LAST) / 60, clock=clock)
    tasks = [task(name, clock) for name in "abcdefg"]
    tasks.insert(1, Task(1, "broken", "other", 1.0, broken))
    # 10 s each; the estimate of the kind is 13 s from the second on
    assert record.run(tasks) == ["broken", "f", "g"]
    assert clock.now == 50
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert list(stored["results"]) == list("abcde")
    assert stored["results"]["b"]["left"] == 50
    assert "no such card" in stored["failed"]["broken"]
    assert [each.name for each in tmp_path.iterdir()] == ["gpu.json"]


def test_a_later_call_goes_on_also_with_an_empty_folder(tmp_path):
    clock = Clock()
    first = Record(tmp_path / "first", minutes=1, clock=clock)
    assert first.run([task("a", clock), task("long", clock, finished=False)]) == ["long"]
    second = Record(tmp_path / "second", minutes=9, previous=tmp_path / "first", clock=clock)
    assert second.run([task("a", clock), task("long", clock), task("b", clock)]) == []
    assert clock.now == 40
    assert set(json.loads((tmp_path / "second" / "gpu.json").read_text())["results"]) == {"a", "long", "b"}


checks_archives = pytest.mark.skipif(
    not hasattr(tarfile, "data_filter"), reason="this Python has no filters for archives"
)


def test_an_archive_that_cannot_be_checked_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with pytest.raises(SystemExit, match=r"code\.tar\.xz: this Python cannot check archives"):
        packing.unpack([tmp_path / "code.tar.xz"], tmp_path / "work")


def images(folder: Path, count: int) -> Path:
    for number in range(count):
        path = folder / "train" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes((number + place * place) % 251 for place in range(40_000)))
    return folder


@checks_archives
def test_packed_parts_are_small_and_unpack_to_the_same(tmp_path):
    source, packed, work = images(tmp_path / "images", 20), tmp_path / "packed", tmp_path / "work"
    packed.mkdir()
    list(packing.pack_data("cifar10", source, packed, limit=0.3))
    archives = sorted(packed.iterdir())
    assert len(archives) == 3
    assert all(each.stat().st_size < 0.3 * 2**20 for each in archives)
    again = tmp_path / "again"
    again.mkdir()
    list(packing.pack_data("cifar10", packed, again))  # a folder of small archives is taken as it is
    packing.unpack(sorted(again.iterdir()), work)
    found = {path.name: path.read_bytes() for path in (work / "data" / "cifar10").rglob("*.jpg")}
    assert found == {path.name: path.read_bytes() for path in source.rglob("*.jpg")}


@checks_archives
def test_packages_travel_with_the_code_and_yield_to_those_that_are_there(tmp_path):
    root, packed, work = tmp_path / "root", tmp_path / "packed", tmp_path / "work"
    (root / "src" / "some").mkdir(parents=True)
    (root / "src" / "some" / "__init__.py").write_text("")
    packed.mkdir()
    for name in ("configs", "benchmarks", "tests"):
        (root / name).mkdir()
    (root / "pyproject.toml").write_text("")
    lines = list(packing.pack_code(root, packed, ["iniconfig"]))
    assert any(line.startswith("iniconfig") and "MiB" in line for line in lines)
    *_, export = packing.unpack([packed / "code.tar.xz"], work)
    assert export == f"export PYTHONPATH={work}/code/src:{work}/lacking"
    assert (work / "code" / "src" / "some" / "__init__.py").is_file()
    assert (work / "site" / "iniconfig" / "__init__.py").is_file()
    assert list((work / "lacking").iterdir()) == []  # this environment has it
    (work / "site" / "not_here_at_all.py").write_text("")
    packing.python_path(work)
    assert [each.name for each in (work / "lacking").iterdir()] == ["not_here_at_all.py"]
    with pytest.raises(SystemExit):
        list(packing.pack_code(root, packed, ["torch"]))  # compiled


@checks_archives
def test_unfinished_runs_go_on_elsewhere(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    out.mkdir()
    for name, finished in (("done", True), ("cut", False), ("large", False)):
        run = work / "cifar10" / "runs" / "pair" / name
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints" / "last.ckpt").write_bytes(bytes(2_000_000 if name == "large" else 400_000))
        (run / "student.safetensors").write_bytes(bytes(300_000))
        if finished:
            (run / "summary.json").write_text("{}")
    notes = training_parts.keep_runs(work, out, ["cifar10"], limit=0.9)
    assert len(notes) == 1
    assert "large" in notes[0]
    assert len(list(out.iterdir())) == 2
    other = tmp_path / "other"
    training_parts.restore_runs(other, (tmp_path, out))
    files = {str(path.relative_to(other / "cifar10" / "runs" / "pair")) for path in other.rglob("*") if path.is_file()}
    assert files == {
        "done/summary.json",
        "done/student.safetensors",
        "cut/checkpoints/last.ckpt",
        "cut/student.safetensors",
    }


def test_finished_runs_are_kept_while_others_run_and_the_time_is_kept(tmp_path, monkeypatch):
    """A program in place of `ackd reproduce` finishes one run, and goes on until it is stopped."""
    import sys

    script = tmp_path / "runs.py"
    script.write_text(
        "import pathlib, sys, time\n"
        f"run = pathlib.Path({str(tmp_path)!r}, 'work', 'digits', 'runs', 'kd', 'seed0')\n"
        "run.mkdir(parents=True)\n"
        "(run / 'summary.json').write_text('{\"last\": {\"test/acc\": 0.5}}')\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(training_parts, "PATIENCE", 2.0)
    monkeypatch.setattr(training_parts, "EVERY", 0.1)
    inner = training_parts.subprocess.Popen
    monkeypatch.setattr(
        training_parts.subprocess, "Popen", lambda _, **options: inner([sys.executable, script], **options)
    )
    record = Record(tmp_path / "out", minutes=9)
    table = training_parts.Table(3, "digits", "digits.yaml", None, "kd", 1, ())
    result = training_parts.reproduce(table, tmp_path / "work", record, 1, 3.5)
    assert result["exit"] == -signal.SIGTERM
    assert result["finished"] is False
    assert result["runs"] == {"kd/seed0": {"last": {"test/acc": 0.5}}}
    assert record.content["results"]["runs of digits"]["runs"] == result["runs"]


def test_every_task_has_a_name_of_its_own_and_files_that_exist(tmp_path):
    options = gpu.argparse.Namespace(parts=gpu.PARTS, tiny=False, seeds=1, settings=[], work=tmp_path, workers=6)
    for name in ("cifar10/cifar10", "tiny/tiny-imagenet-200"):
        (tmp_path / "data" / name / "train").mkdir(parents=True)
    found = list(gpu.tasks(options, Record(tmp_path / "out", minutes=9)))
    assert len({each.name for each in found}) == len(found)
    assert {each.part for each in found} == {1, 2, 3, 4}
    assert all((speed_parts.ROOT / each).is_file() for each in speed_parts.GPU_TESTS)
    marked = {
        str(path.relative_to(speed_parts.ROOT))
        for path in (speed_parts.ROOT / "tests").rglob("test_*.py")
        if path.parts[-2] != "benchmarks" and "mark.gpu" in path.read_text()
    }
    assert marked == set(speed_parts.GPU_TESTS)
    for table in training_parts.tables(tiny=False, seeds=1, settings=()):
        assert Path(table.file).is_file()


def test_goals_are_read_off_the_fastest_way():
    where = "resnet110_resnet20 batch 128"
    results = {
        f"{where}: loop with loader": {"images_per_second": 1000},
        f"{where}: kd fast": {"images_per_second": 4000, "busy_share": 0.5},
        f"{where}: kd graphs": {"images_per_second": 6000, "busy_share": 0.95},
        f"{where}: ackd fast": {"images_per_second": 10_000, "busy_share": 0.8},
    }
    found = list(goals(results))
    assert [line.endswith("met") for line in found] == [True, False, True, False]  # 6 x; 16.7 minutes; 95 %; 80 %
    assert list(goals({f"{where}: loop with loader": {"images_per_second": 1000}})) == []


def test_the_busy_share_counts_overlaps_once():
    assert busy_share([(0, 2), (1, 3), (5, 10), (6, 7)]) == pytest.approx(0.8)
    assert busy_share([]) is None


def test_unknown_parts_are_refused():
    with pytest.raises(SystemExit):
        gpu.main(["run", "--out", "x", "--parts", "1,7"])
