"""``ackd reproduce TABLE``: plan the runs, run the missing ones, write the table."""

from __future__ import annotations

import contextlib
import difflib
import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from ackd_lightning.commands.processes import devices_for, resumable
from ackd_lightning.commands.reproduce.estimate import job_seconds, megabytes
from ackd_lightning.commands.reproduce.jobs import Job, changed, check_unchanged, union
from ackd_lightning.commands.reproduce.output import METRIC_NAMES, columns, read_records, write_records, write_tables
from ackd_lightning.commands.reproduce.planning import Planner, needs_teacher
from ackd_lightning.commands.reproduce.proxies import proxy_lines
from ackd_lightning.commands.reproduce.results import Line, lines, note, record
from ackd_lightning.commands.reproduce.running import OUTPUT_IN, Runner
from ackd_lightning.commands.reproduce.specs import Pair, Row, TableSpec
from ackd_lightning.commands.reproduce.tables import choose, read_table, table_names
from ackd_lightning.commands.stopwatch import Stopwatch, rough
from ackd_lightning.errors import ACKDError, RunsFailedError
from ackd_lightning.runs.console import show_table

_MOST_SEEDS = 1000


def read_seeds(text: str) -> tuple[int, ...]:
    """Parse ``--seeds``: the number of seeds, or a list of them.

    Args:
        text: Such as ``3``, which means 0, 1, 2; or ``0,5``; or ``3,`` for 3 alone.

    Raises:
        ACKDError: When the text is neither.

    Examples:
        >>> read_seeds("3"), read_seeds("0,5"), read_seeds("3,")
        ((0, 1, 2), (0, 5), (3,))
    """
    parts = [part.strip() for part in text.strip().removesuffix(",").split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ACKDError(f"--seeds is {text!r}; use a number of seeds (3) or a list of seeds (0,5)")
    numbers = tuple(dict.fromkeys(int(part) for part in parts))
    if "," in text:
        return numbers
    if not 1 <= numbers[0] <= _MOST_SEEDS:
        raise ACKDError(f"--seeds is {text}; use 1 to {_MOST_SEEDS}")
    return tuple(range(numbers[0]))


_OURS = {"seed_everything": "use --seeds", "runs_dir": "use --out"}
_OURS |= dict.fromkeys(("name", "ckpt_path", "resume"), "leave it out")
_OPTIONS = ("pair", "methods", "seeds", "out", "preset", "dry-run", "workers", "against")
_OURS["model.teacher.weights"] = "put the file where the pair's configuration names it"


def _refuse_ours(overrides: Sequence[str]) -> None:
    """Refuse settings that would silently replace those of the plan, and misspelled options."""
    for part in overrides:
        name = part.removeprefix("--").partition("=")[0]
        if part.startswith("--") and name in _OURS:
            raise ACKDError(f"--{name} is set by `ackd reproduce` for every run; {_OURS[name]}")
        near = difflib.get_close_matches(name, _OPTIONS, n=1, cutoff=0.8)
        if part.startswith("--") and near:
            raise ACKDError(f"`ackd reproduce` has no option --{name}; did you mean --{near[0]}?")


def _print_plan(title: str, jobs: Sequence[Job]) -> None:
    """Print every run with an estimate; nothing is trained."""
    watch = Stopwatch()
    table = Table(title=f"{title}: {len(jobs)} runs")
    for column in ("run", "state", "epochs", "about", "MB", "folder"):
        table.add_column(column, justify="right" if column in ("epochs", "about", "MB") else "left", overflow="fold")
    total, size, unknown = 0.0, 0.0, 0
    for job in jobs:
        seconds = job_seconds(watch, job)
        if not job.finished:
            unknown += seconds is None
            total, size = total + (seconds or 0.0), size + megabytes(job)
        about = "data missing" if seconds is None else rough(seconds)
        place = "/".join(job.folder.parts[-2:])
        table.add_row(job.title, job.state(), str(job.epochs), about, f"{megabytes(job):.0f}", place)
    show_table(table)
    left = sum(not job.finished for job in jobs)
    more = f", {unknown} of unknown duration (their data are missing)" if unknown else ""
    print(
        f"{left} runs to do, about {rough(total)} one after another on {watch.device.type} at its present load"
        f"{more}, {_size(size)} of checkpoints; data sets and the computations of the methods are not included"
    )


def _size(megabytes: float) -> str:
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.2f} GB"


def _fetch_data(jobs: Sequence[Job]) -> None:
    """Download and check data once, before several processes do it at the same time."""
    seen: set[str] = set()
    for job in jobs:
        key = json.dumps(job.config["data"], sort_keys=True)
        if key not in seen and not job.finished:
            seen.add(key)
            job.images.prepare_data()


def _plan(
    table: TableSpec, pairs: Sequence[Pair], rows: Sequence[Row], seeds: Sequence[int], planner: Planner
) -> list[Job]:
    for pair in pairs:
        taught = any(needs_teacher(row, pair) and row.teacher != "itself" for row in rows)
        if taught and planner.given_weights(pair) is None:
            planner.teacher(pair)
    for row in rows:  # the runs of a row follow one another
        for pair in pairs:
            planner.add(pair, row, seeds)
    order = {"teacher": 0, "early_stopped": 1, "assistant": 2, "student": 3}
    jobs = sorted(planner.jobs.values(), key=lambda job: order[job.kind])
    for job in jobs:
        check_unchanged(job)
    return jobs


@contextlib.contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Let the collector of garbage look at what is made from here on, and not at every imported module."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def reproduce(
    name: str,
    *,
    pairs: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: str = "3",
    out: str | None = None,
    preset: str | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    against: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Run what one table, or every table, needs, and write the table.

    Args:
        name: ``table1`` .. ``table7``, ``all``, or a file of the same form as ``configs/tables/table2.yaml``.
        pairs: Names of pairs; empty: all pairs of the table.
        methods: Rows of the table or fragments of ``configs/methods``; empty: all rows.
        seeds: Number of seeds, or a list of them.
        out: Folder for runs and tables; None: ``reproduce/NAME``.
        preset: ``smoke``: the same rows on digits, in minutes.
        dry_run: Whether to print the runs with estimates and stop.
        workers: Number of concurrent runs; None: one per GPU.
        against: Row from which the difference of every other row is printed; None: the first row of plain
            KD that was run.
        overrides: Settings of ``ackd fit`` for every run.

    Raises:
        ACKDError: When an argument is wrong, before any training.
        RunsFailedError: When runs failed, after all others have finished.
    """
    chosen_seeds, devices = read_seeds(seeds), devices_for(workers)
    _refuse_ours(overrides)
    names = table_names() if name == "all" else [name]
    work: list[tuple[TableSpec, Path, list[Pair], list[Row], Planner, list[Job]]] = []
    with _only_new_garbage():
        for each in names:
            table = read_table(each, preset)
            folder = Path(out or "reproduce") / (table.name if out is None or name == "all" else "")
            some_pairs, rows = choose(table, pairs, methods)
            if against is not None:
                choose(table, (), [against], option="--against")  # refuses an unknown row
            planner = Planner(table, folder if name != "all" else folder.parent, overrides)
            planned = _plan(table, some_pairs, rows, chosen_seeds, planner)
            read_records(planner.out / "results.json")
            work.append((table, folder, some_pairs, rows, planner, planned))
        everything = union(job for *_, jobs in work for job in jobs)
        if dry_run:
            _print_plan(", ".join(table.name for table, *_ in work), list(everything.values()))
            return
    started = time.monotonic()
    if len(devices) > 1:
        _fetch_data(list(everything.values()))
    done = sum(job.finished for job in everything.values())
    place = work[0][4].out
    print(f"{len(everything)} runs, {done} of them finished, files in {place}", flush=True)
    with resumable():
        failed = Runner(place / "logs", devices).run_all(list(everything.values()))
    for table, folder, some_pairs, rows, planner, jobs in work:
        others = _other_rows(table, rows, planner.out)
        known = {job.folder for job in jobs}  # those of teachers can be those of a row as well
        earlier = _earlier(table, some_pairs, rows, others, chosen_seeds, planner)
        shown = [*jobs, *(job for job in earlier if job.folder not in known)]
        _report(table, folder, some_pairs, rows, others, planner, shown, failed, against)
    print(f"{len(everything)} runs in {rough(time.monotonic() - started)}")
    if failed:
        reasons = _together({everything[folder].title: reason for folder, reason in failed.items()})
        raise RunsFailedError(
            f"{len(failed)} of {len(everything)} runs failed ({reasons}); run the same command again to repeat them"
        )


def _together(failed: Mapping[str, str]) -> str:
    """Reasons of failed runs by title, with runs that failed for the same reason in one part."""
    titles: dict[str, list[str]] = {}
    for title, reason in failed.items():
        titles.setdefault(reason.partition(OUTPUT_IN)[0], []).append(title)
    first = {own[0]: own for own in titles.values()}  # the reason of the first names its log
    return "; ".join(f"{', '.join(own)}: {failed[title]}" for title, own in first.items())


def _earlier(
    table: TableSpec,
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    others: Sequence[Row],
    seeds: Sequence[int],
    planner: Planner,
) -> list[Job]:
    """Finished runs of an earlier call with the same settings: teachers, and rows that were not asked for now.

    Those with other settings are said.
    """
    found: list[Job] = []
    for pair in pairs:
        if planner.given_weights(pair) is None and planner.known_teacher(pair) is None:
            with contextlib.suppress(ACKDError):  # the pair has no teacher, only students alone
                job = planner.teacher(pair)
                found += [job] if _is_kept(job) else []
    for row in [*table.rows.values(), *others]:
        if row in rows or not any(planner.out.glob(f"runs/*/{row.name}-seed*/summary.json")):
            continue
        for pair in pairs:
            with contextlib.suppress(ACKDError):  # the pair cannot have this row
                found += [job for job in planner.add(pair, row, seeds) if _is_kept(job)]
    return found


def _is_kept(job: Job) -> bool:
    """Whether a run of an earlier call is finished and has the planned settings; other settings are said."""
    if not job.finished or (change := changed(job)) is None:
        return job.finished
    key, there, planned = change
    print(
        f"{job.title}, in {job.folder}, was made with {key} = {there} and would now have {planned}: the table leaves "
        "it out"
    )
    return False


def _other_rows(table: TableSpec, rows: Sequence[Row], out: Path) -> list[Row]:
    """Rows that an earlier call was given by ``--methods`` and that the table does not list."""
    named = dict.fromkeys(each["row"] for each in read_records(out / "results.json"))
    found: list[Row] = []
    for name in named:
        if name and name not in table.rows and name not in {row.name for row in rows}:
            with contextlib.suppress(ACKDError):  # a row of another table with the same folder
                found += choose(table, (), [name])[1]
    return found


def _report(
    table: TableSpec,
    folder: Path,
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    others: Sequence[Row],
    planner: Planner,
    jobs: Sequence[Job],
    failed: dict[Path, str],
    against: str | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    records = [record(job) for job in jobs if job.finished]
    recorded = {each["row"] for each in records}
    plain = [row.name for row in table.rows.values() if (row.method, row.teacher) == ("kd", "teacher")]
    against = against or next((name for name in plain if name in recorded), None)
    write_records(records, planner.out / "results.json")
    given = [planner.given_weights(pair) for pair in pairs]
    text = note(table, records, given=[path for path in given if path is not None])
    if table.proxies:
        content: list[Line] = proxy_lines(table, pairs, rows, [job for job in jobs if job.finished], planner)
    else:
        reasons = {(job.pair, job.row): failed[job.folder] for job in jobs if job.folder in failed}
        done = [row for row in others if row.name in recorded]
        content = lines(table, pairs, [*rows, *done], records, planner, reasons, against)
    files = write_tables(table, content, folder, text, against)
    asked = {"teacher", *(row.name for row in rows)}
    for pair in dict.fromkeys(line.pair for line in content):
        for metric in dict.fromkeys(line.metric for line in content):
            shown = Table(title=f"{table.title}: {pair}, {METRIC_NAMES[metric]}")
            heads = columns(against)
            for column in heads:
                shown.add_column(column, justify="left" if column == "row" else "right")
            own = [line for line in content if (line.pair, line.metric) == (pair, metric)]
            absent = [line.row for line in own if line.row not in asked and not line.last]
            for line in own:
                if line.row not in absent:
                    shown.add_row(*line.cells()[: len(heads)])
            show_table(shown)
            if absent:
                print(f"Not run, and not asked for: {', '.join(absent)} ({files[0]} has their lines)")
    print(text)
    print(", ".join(map(str, [*files, planner.out / "results.json"])))
