"""Part 3: the paper's schedule on CIFAR-10 as JPEG. Part 4: Tiny-ImageNet with a shorter one. Runs side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rented.packing import extract
from rented.record import Record, Task
from rented.speed_parts import BENCHMARKS

METHODS = "ce,kd,kd_1_1,ackd,ackd_direct,kd_ls,dkd"
LARGEST = 15
"""Largest size in MiB of the archives with which runs go on elsewhere."""
PATIENCE = 40.0
"""Seconds in which runs write a checkpoint and stop."""
EVERY = 5.0
"""Seconds between two looks at the runs."""


@dataclass(frozen=True)
class Table:
    """Runs of one part.

    Attributes:
        part: Number of the part.
        name: Name of the folder of its runs.
        file: Table of ``ackd reproduce``.
        data: Folder below ``data`` with the images.
        methods: Rows.
        seeds: Seeds.
        settings: Settings of ``ackd fit`` for every run.
    """

    part: int
    name: str
    file: str
    data: str | None
    methods: str
    seeds: int
    settings: tuple[str, ...]


def tables(*, tiny: bool, seeds: int, settings: Sequence[str]) -> tuple[Table, ...]:
    """Return the tables of parts 3 and 4."""
    given = tuple(settings)
    if tiny:
        short = ("--trainer.max_epochs", "1", "--model.lr_scheduler.milestones", "[1]", "--data.max_per_class", "4")
        slow = (each for each in given if each != "--fast")  # compiling takes longer than such a run
        quick = (*short, "--model.teacher.gate", "warn", *slow)
        return (Table(3, "digits", str(BENCHMARKS / "tables" / "fast_digits.yaml"), None, "kd", 1, quick),)
    return (
        Table(3, "cifar10", str(BENCHMARKS / "tables" / "gpu_cifar10_jpeg.yaml"), "cifar10", METHODS, seeds, given),
        Table(4, "tinyimagenet", str(BENCHMARKS / "tables" / "gpu_tinyimagenet.yaml"), "tiny", METHODS, seeds, given),
    )


def missing_data(table: Table, work: Path) -> bool:
    """Return whether the images of a table are not there."""
    return table.data is not None and not any((work / "data" / table.data).rglob("train"))


def results_of(runs: Path) -> dict[str, Any]:
    """Summaries of the finished runs by the name of their folder."""
    return {
        "/".join(path.parts[-3:-1]): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(runs.glob("*/*/summary.json"))
    }


def reproduce(table: Table, work: Path, record: Record, workers: int, left: float) -> dict[str, Any]:
    """Run ``ackd reproduce`` until all runs are finished or the time is over; what is finished is kept at once."""
    out, name = work / table.name, f"runs of {table.name}"
    command = [sys.executable, "-m", "ackd_lightning", "reproduce", table.file, "--methods", table.methods]
    command += ["--seeds", str(table.seeds), "--out", str(out), "--workers", str(workers), *table.settings]
    if table.data is not None:
        root = next(iter(sorted((work / "data" / table.data).rglob("train")))).parent
        command += ["--data.root", str(root)]
    work.mkdir(parents=True, exist_ok=True)
    end, seen = time.monotonic() + left - PATIENCE, 0
    log = work / f"{table.name}.log"
    with log.open("a", encoding="utf-8") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=work, env=dict(os.environ))
        try:
            while child.poll() is None and time.monotonic() < end:
                time.sleep(min(EVERY, max(0.0, end - time.monotonic())))
                found = results_of(out / "runs")
                if len(found) > seen:
                    seen = len(found)
                    record.keep(name, {"finished": False, "runs": found})
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)  # the runs write a checkpoint
                try:
                    child.wait(timeout=PATIENCE)
                except subprocess.TimeoutExpired:
                    child.kill()
    table_file = out / f"{Path(table.file).stem}.md"
    text = table_file.read_text(encoding="utf-8") if table_file.is_file() else None
    if child.returncode not in (0, -signal.SIGTERM, 128 + signal.SIGTERM) and not (out / "runs").is_dir():
        raise RuntimeError(log.read_text(encoding="utf-8")[-1500:])
    finished = child.returncode == 0
    return {"finished": finished, "exit": child.returncode, "runs": results_of(out / "runs"), "table": text}


def part(table: Table, work: Path, record: Record, workers: int) -> Iterator[Task]:
    """The task of a table, if its data are there."""
    if missing_data(table, work):
        print(f"runs of {table.name}: left out, because there is no folder {work / 'data' / str(table.data)}")
        return
    run = partial(reproduce, table, work, record, workers)
    yield Task(table.part, f"runs of {table.name}", f"runs of {table.name}", PATIENCE + 30, run)


# ---------------------------------------------------------------- runs that go on elsewhere


def _needed(run: Path) -> list[Path]:
    """Files with which a finished run counts, or an interrupted one goes on."""
    files = [
        path for path in run.rglob("*") if path.is_file() and path.parent.name not in ("checkpoints", "predictions")
    ]
    if not (run / "summary.json").is_file():
        files += list(run.glob("checkpoints/last.ckpt"))
    return files


def keep_runs(work: Path, out: Path, names: Sequence[str], *, limit: float = LARGEST) -> list[str]:
    """Write archives of runs into the folder that comes back.

    Args:
        work: Folder of the runs.
        out: Folder for the archives.
        names: Names of the tables.
        limit: Largest size of one archive in MiB.

    Returns:
        Sentences about runs that are too large.
    """
    for old in out.glob("runs-*.tar"):
        old.unlink()
    bins: list[tuple[float, list[Path]]] = []
    notes = []
    for run in sorted(path for name in names for path in (work / name / "runs").glob("*/*") if path.is_dir()):
        files = _needed(run)
        size = sum(each.stat().st_size + 1024 for each in files) / 2**20
        if size > limit:
            notes.append(f"{run} has {size:.0f} MiB and does not come back")
            continue
        place = next((number for number, each in enumerate(bins) if each[0] + size <= limit), None)
        if place is None:
            bins.append((0.0, []))
            place = len(bins) - 1
        bins[place] = bins[place][0] + size, bins[place][1] + files
    for number, (_, files) in enumerate(bins):
        with tarfile.open(out / f"runs-{number}.tar", "w") as archive:
            for each in files:
                archive.add(each, str(each.relative_to(work)), recursive=False)
    return notes


def restore_runs(work: Path, folders: Sequence[Path | None]) -> None:
    """Unpack archives of runs, unless there are runs already.

    Args:
        work: Folder of the runs.
        folders: Folders with archives; the first one that has some counts.
    """
    if any(work.glob("*/runs")):
        return
    for archive in next((found for each in folders if each and (found := sorted(each.glob("runs-*.tar")))), []):
        extract(archive, work)
