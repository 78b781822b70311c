"""Results of the runs of a table: records, table lines, and the note below the table."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ackd_lightning.commands.compare import curves, mean_and_std
from ackd_lightning.commands.reproduce.jobs import Job
from ackd_lightning.commands.reproduce.planning import Planner
from ackd_lightning.commands.reproduce.specs import Pair, Row, TableSpec
from ackd_lightning.metrics.intervals import mean_interval
from ackd_lightning.models.stated import read_notes
from ackd_lightning.models.weights import read_metadata
from ackd_lightning.runs.files import read_summary

NOT_RUN = "not run"


def place_of(job: Job) -> str:
    """Return where a run lies below the folder of the results, ``runs/CONFIGURATION/NAME``.

    Args:
        job: Run.
    """
    return "/".join(job.folder.parts[-3:])


def record(job: Job) -> dict[str, Any]:
    """Describe a finished run as plain data.

    Args:
        job: Finished run.

    Returns:
        Settings, versions and accuracies in [0, 1]: ``last`` of the last epoch, ``best`` of the epoch that is best on
        ``best_on``.
    """
    summary = read_summary(job.folder)
    tested: dict[str, Any] = summary.get("test", {})
    last = tested.get("last") or summary["last"]
    best, best_on = tested.get("best"), "validation"
    if best is None and summary["shown"] == "test":
        best_on = "test"
        has_curves = (job.folder / "metrics.csv").is_file()  # none with --trainer.logger false
        by_metric = {key: curves(job.folder, key)[1] for key in ("acc", "acc_top5") if has_curves}
        best = {f"test/{key}": max(values) / 100 for key, values in by_metric.items() if values}
    versions = summary["versions"]
    return {
        "pair": job.pair,
        "row": job.row,
        "kind": job.kind,
        "seed": job.seed,
        "run": place_of(job),
        "config_hash": job.config_hash,
        "commit": versions.get("commit"),
        "versions": {key: value for key, value in versions.items() if key != "commit"},
        "device": summary["device"],
        "precision": summary["precision"],
        "skipped_steps": summary.get("skipped_steps", 0),
        "teacher_acc": summary.get("teacher", {}).get("acc") if summary["shown"] == "test" else None,
        "epochs": summary["epochs"],
        "seconds": summary["seconds"],
        "last": _accuracies(last),
        "best": _accuracies(best or {}),
        "best_on": best_on if best else None,
    }


def _accuracies(values: dict[str, float]) -> dict[str, float]:
    return {key.removeprefix("test/"): value for key, value in values.items() if key.startswith("test/acc")}


@dataclass(frozen=True)
class Line:
    """A line of the finished table.

    Attributes:
        pair: Name of the pair.
        row: Name of the row.
        label: Printed name of the row.
        metric: ``acc``, ``acc_top5``, or a metric of a proxy.
        paper: Figure of the paper, in the unit of the table; None without one.
        last: Our values of the last epoch in the same unit, one per seed.
        best: Our values of the best epoch.
        over: Our value of the last epoch minus that of the row of reference with the same seed, for every common seed.
        failed: Text in place of missing values.
        decimals: Number of printed decimals.
    """

    pair: str
    row: str
    label: str
    metric: str
    paper: float | None
    last: tuple[float, ...]
    best: tuple[float, ...]
    over: tuple[float, ...] = ()
    failed: str = ""
    decimals: int = 2

    @property
    def difference(self) -> str:
        """Our mean minus the figure of the paper, in points."""
        if self.paper is None or not self.last:
            return "-"
        return f"{statistics.fmean(self.last) - self.paper:+.{self.decimals}f}"

    def cells(self) -> list[str]:
        """Cells of the line as text."""
        paper = "-" if self.paper is None else f"{self.paper:.{self.decimals}f}"
        ours = [self.ours, self._interval(self.last, (0.0, 100.0)), mean_and_std(self.best, self.decimals)]
        over = f"{statistics.fmean(self.over):+.{self.decimals}f} ({self._interval(self.over)})" if self.over else "-"
        return [self.label, paper, *ours, str(len(self.last)), self.difference, over]

    def _interval(self, values: Sequence[float], within: tuple[float, float] = (-math.inf, math.inf)) -> str:
        """Return the 95 % interval of the mean over the seeds, cut at the ends of a scale; a dash if not known."""
        found = mean_interval(values)
        if found is None or found[0] == found[1]:
            return "-"
        return " to ".join(f"{min(max(end, within[0]), within[1]):.{self.decimals}f}" for end in found)

    @property
    def ours(self) -> str:
        """Our values of the last epoch as text."""
        return mean_and_std(self.last, self.decimals) if self.last else self.failed or NOT_RUN


def lines(
    table: TableSpec,
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    records: Sequence[dict[str, Any]],
    planner: Planner,
    failed: dict[tuple[str, str], str],
    against: str | None = None,
) -> list[Line]:
    """Build every line of the table, including rows that were not requested.

    Args:
        table: Table with the figures of the paper.
        pairs: Requested pairs.
        rows: Requested rows; the other rows of the table are shown as not run.
        records: Records of finished runs.
        planner: Planner of the table, which knows the teachers' files.
        failed: Reasons of failures by pair and row.
        against: Row of reference, from which every other row's difference is computed; None for none.
    """
    shown = [*table.rows.values(), *(row for row in rows if row.name not in table.rows)]
    result: list[Line] = []
    for metric_number, metric in enumerate(table.metrics):
        for pair in pairs:
            taught = [row.name for row in shown if row.teacher == "teacher"]
            reference = _by_seed(records, pair.name, against, metric)
            result.append(_teacher_line(table, pair, metric, metric_number, records, planner, taught))
            for row in shown:
                own = [each for each in records if (each["pair"], each["row"]) == (pair.name, row.name)]
                ours = {} if row.name == against else _by_seed(records, pair.name, row.name, metric)
                result.append(
                    Line(
                        pair.name,
                        row.name,
                        row.label,
                        metric,
                        _as_accuracy(table, pair.figure(row.name, metric_number)),
                        _percent(own, "last", metric),
                        _percent(own, "best", metric),
                        tuple(ours[seed] - reference[seed] for seed in ours if seed in reference),
                        "failed" if (pair.name, row.name) in failed and not own else "",
                    )
                )
    return result


def _by_seed(records: Sequence[dict[str, Any]], pair: str, row: str | None, metric: str) -> dict[int, float]:
    own = [each for each in records if (each["pair"], each["row"]) == (pair, row) and metric in each["last"]]
    return {each["seed"]: 100 * each["last"][metric] for each in own}


def _percent(records: Sequence[dict[str, Any]], which: str, metric: str) -> tuple[float, ...]:
    return tuple(100 * each[which][metric] for each in records if metric in each[which])


def _as_accuracy(table: TableSpec, figure: float | None) -> float | None:
    return figure if figure is None or not table.error else round(100 - figure, 2)


def _teacher_line(
    table: TableSpec,
    pair: Pair,
    metric: str,
    number: int,
    records: Sequence[dict[str, Any]],
    planner: Planner,
    taught: Sequence[str],
) -> Line:
    weights = planner.given_weights(pair)
    last: tuple[float, ...] = ()
    best: tuple[float, ...] = ()
    if weights is not None:
        has_metadata = weights.suffix == ".safetensors"  # other formats have none
        known = read_metadata(weights).get(f"test_{metric}") if has_metadata else None
        seen = [
            each["teacher_acc"]
            for each in records
            if each["pair"] == pair.name and each["row"] in taught and each["teacher_acc"] is not None
        ]
        if known is None and metric == "acc" and seen:
            known = seen[0]  # measured when a run loaded this teacher
        last = (100 * float(known),) if known else ()
    else:
        job = planner.known_teacher(pair)
        own = [each for each in records if job and each["run"] == place_of(job)]
        last = _percent(own, "last", metric)
        best = _percent(own, "best", metric)
    paper = _as_accuracy(table, pair.figure("teacher", number))
    return Line(pair.name, "teacher", "teacher", metric, paper, last, best)


def _with_accuracy(weights: Path) -> str:
    """Return the name of a weight file with the accuracy that it states."""
    notes = read_notes(weights)
    stated = {"test_acc": "the test set", "val_acc": "its validation images"}
    for key, where in stated.items():
        with contextlib.suppress(KeyError, ValueError):
            if 0 <= (accuracy := float(notes[key])) <= 1:  # false for nan
                return f"{weights} ({100 * accuracy:.2f} % on {where})"
    return str(weights)


def note(table: TableSpec, records: Sequence[dict[str, Any]], *, given: Sequence[Path] = ()) -> str:
    """Write the note below a table: what its numbers are and what they depend on.

    Args:
        table: Table of the paper.
        records: Records of its runs.
        given: Weight files of teachers that were not trained here.
    """
    students = [each for each in records if each["kind"] == "student"]
    epochs = sorted({each["epochs"] for each in students})
    parts = [
        "Accuracy in % on the test set, mean ± sample standard deviation over n seeds, with the 95 % interval of the "
        "mean (Student's t); differences from a row are those of runs with the same seed."
    ]
    if table.error:
        parts.append("The paper reports errors; the table shows 100 minus the error.")
    if table.proxies:
        parts = [
            "Measured on the test set, mean ± sample standard deviation over n seeds: linear CKA of the embeddings, KL "
            "at temperature 1."
        ]
    elif any(each["best_on"] == "test" for each in students):
        parts.append(
            "`best` is the best epoch on the test set itself and therefore too optimistic; nothing else is selected."
        )
    elif students:
        parts.append("`best` is the epoch with the highest validation accuracy.")
    if given:
        parts.append(f"Teachers that were not trained here: {', '.join(map(_with_accuracy, given))}.")
    if students:
        devices = sorted({each["device"] for each in students})
        versions = sorted({", ".join(f"{k} {v}" for k, v in each["versions"].items()) for each in students})
        commits = sorted({each["commit"] or "unknown" for each in students})
        precisions = sorted({each["precision"] for each in students})
        parts.append(f"Epochs: {', '.join(map(str, epochs))}. Device: {'; '.join(devices)}, {', '.join(precisions)}.")
        if skipped := sum(each["skipped_steps"] for each in students):
            parts.append(f"{skipped} steps were skipped because of a non-finite loss.")
        parts.append(f"Versions: {'; '.join(versions)}. Commit: {', '.join(commits)}.")
    return " ".join(parts)
