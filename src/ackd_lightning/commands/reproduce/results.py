"""What the runs of a table gave: ``results.json``, and the table as Markdown, CSV and PNG."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ackd_lightning.commands.compare import curves
from ackd_lightning.commands.reproduce.planning import Job, Planner
from ackd_lightning.commands.reproduce.tables import Pair, Row, TableSpec
from ackd_lightning.models.weights import read_metadata
from ackd_lightning.runs.files import read_summary, write_json

NOT_RUN = "not run"
METRIC_NAMES = {
    "acc": "top-1 accuracy in %",
    "acc_top5": "top-5 accuracy in %",
    "cka": "linear CKA of the embeddings",
    "kl": "KL divergence in nats",
    "proxy": "accuracy and gap in %",
}


def record(job: Job) -> dict[str, Any]:
    """One finished run as plain data.

    Args:
        job: finished.

    Returns:
        Accuracies in [0, 1]: ``last`` is the last epoch's; ``best`` that of the best epoch, chosen on ``best_on``.
    """
    summary = read_summary(job.folder)
    tested: dict[str, Any] = summary.get("test", {})
    last = tested.get("last") or summary["last"]
    best, best_on = tested.get("best"), "validation"
    if best is None and summary["shown"] == "test":
        best_on = "test"
        has_curves = (job.folder / "metrics.csv").is_file()  # not with --trainer.logger false
        by_metric = {key: curves(job.folder, key)[1] for key in ("acc", "acc_top5") if has_curves}
        best = {f"test/{key}": max(values) / 100 for key, values in by_metric.items() if values}
    versions = summary["versions"]
    return {
        "pair": job.pair,
        "row": job.row,
        "kind": job.kind,
        "seed": job.seed,
        "run": str(job.folder.resolve()),
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
        pair: its name.
        row: its name.
        label: in print.
        metric: ``acc`` or ``acc_top5``.
        paper: the paper's figure, in the unit of the table.
        last: ours in the same unit, a value per seed.
        best: the same of the best epoch.
        failed: why runs are missing.
        decimals: shown.
    """

    pair: str
    row: str
    label: str
    metric: str
    paper: float | None
    last: tuple[float, ...]
    best: tuple[float, ...]
    failed: str = ""
    decimals: int = 2

    @property
    def difference(self) -> str:
        """Ours minus the paper's, in points."""
        if self.paper is None or not self.last:
            return "-"
        return f"{statistics.fmean(self.last) - self.paper:+.{self.decimals}f}"

    def cells(self) -> list[str]:
        """The line as text."""
        paper = "-" if self.paper is None else f"{self.paper:.{self.decimals}f}"
        ours = [self.spread(self.last) if self.last else self.failed or NOT_RUN, self.spread(self.best)]
        return [self.label, paper, *ours, str(len(self.last)), self.difference]

    def spread(self, values: Sequence[float]) -> str:
        """Mean and sample standard deviation.

        Args:
            values: one per seed.
        """
        if not values:
            return "-"
        text = f"{statistics.fmean(values):.{self.decimals}f}"
        return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{self.decimals}f}"


COLUMNS = ["row", "paper", "ours, last", "ours, best", "n", "difference"]


def lines(
    table: TableSpec,
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    records: Sequence[dict[str, Any]],
    planner: Planner,
    failed: dict[tuple[str, str], str],
) -> list[Line]:
    """Every line of the table, also of rows that were not asked for.

    Args:
        table: the paper's figures.
        pairs: that were asked for.
        rows: that were asked for; those of the table that are missing are shown as not run.
        records: of finished runs.
        planner: knows teachers that were given as files.
        failed: reason by pair and row.
    """
    shown = [*table.rows.values(), *(row for row in rows if row.name not in table.rows)]
    result: list[Line] = []
    for metric_number, metric in enumerate(table.metrics):
        for pair in pairs:
            taught = [row.name for row in shown if row.teacher == "teacher"]
            result.append(_teacher_line(table, pair, metric, metric_number, records, planner, taught))
            for row in shown:
                own = [each for each in records if (each["pair"], each["row"]) == (pair.name, row.name)]
                result.append(
                    Line(
                        pair.name,
                        row.name,
                        row.label,
                        metric,
                        _as_accuracy(table, pair.figure(row.name, metric_number)),
                        _percent(own, "last", metric),
                        _percent(own, "best", metric),
                        "failed" if (pair.name, row.name) in failed and not own else "",
                    )
                )
    return result


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
        says_so = weights.suffix == ".safetensors"  # the one kind of file that has metadata
        known = read_metadata(weights).get(f"test_{metric}") if says_so else None
        seen = [
            each["teacher_acc"]
            for each in records
            if each["pair"] == pair.name and each["row"] in taught and each["teacher_acc"] is not None
        ]
        if known is None and metric == "acc" and seen:
            known = seen[0]  # measured by the gate of a run that it taught
        last = (100 * float(known),) if known else ()
    else:
        job = planner.known_teacher(pair)
        own = [each for each in records if job and each["run"] == str(job.folder.resolve())]
        last = _percent(own, "last", metric)
        best = _percent(own, "best", metric)
    paper = _as_accuracy(table, pair.figure("teacher", number))
    return Line(pair.name, "teacher", "teacher", metric, paper, last, best)


def note(table: TableSpec, records: Sequence[dict[str, Any]], *, given: Sequence[Path] = ()) -> str:
    """What a reader of the table has to know.

    Args:
        table: the table.
        records: behind it.
        given: weight files of teachers that were there before.
    """
    students = [each for each in records if each["kind"] == "student"]
    epochs = sorted({each["epochs"] for each in students})
    parts = ["Accuracy in % on the test set, mean ± sample standard deviation over n seeds."]
    if table.error:
        parts.append("The paper gives errors; shown is 100 minus them.")
    if table.proxies:
        parts = [
            "Measured on the test set, mean ± sample standard deviation over n seeds: linear CKA of the embeddings, KL "
            "at temperature 1."
        ]
    elif any(each["best_on"] == "test" for each in students):
        parts.append("`best` is the highest epoch on the test set itself, so it is too high; nothing else is selected.")
    elif students:
        parts.append("`best` is the epoch with the highest validation accuracy.")
    if given:
        parts.append(f"Teachers that were given, not trained here: {', '.join(map(str, given))}.")
    if students:
        devices = sorted({each["device"] for each in students})
        versions = sorted({", ".join(f"{k} {v}" for k, v in each["versions"].items()) for each in students})
        commits = sorted({each["commit"] or "unknown" for each in students})
        precisions = sorted({each["precision"] for each in students})
        parts.append(f"Epochs: {', '.join(map(str, epochs))}. Device: {'; '.join(devices)}, {', '.join(precisions)}.")
        if skipped := sum(each["skipped_steps"] for each in students):
            parts.append(f"{skipped} steps were skipped, because their loss was not finite.")
        parts.append(f"Versions: {'; '.join(versions)}. Commit: {', '.join(commits)}.")
    return " ".join(parts)


def write_tables(table: TableSpec, content: Sequence[Line], out: Path, text: str) -> list[Path]:
    """Write Markdown, CSV and PNG.

    Args:
        table: the table.
        content: its lines.
        out: folder.
        text: note below the table.

    Returns:
        The files.
    """
    markdown, plain, figure = (out / f"{table.name}.{suffix}" for suffix in ("md", "csv", "png"))
    parts = [f"# {table.title}", ""]
    for metric in dict.fromkeys(line.metric for line in content):
        for pair in dict.fromkeys(line.pair for line in content):
            own = [line for line in content if (line.pair, line.metric) == (pair, metric)]
            parts += [f"## {pair}, {METRIC_NAMES[metric]}", ""]
            parts += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
            parts += [f"| {' | '.join(line.cells())} |" for line in own] + [""]
    markdown.write_text("\n".join([*parts, text, ""]), encoding="utf-8")
    with plain.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["pair", "metric", *COLUMNS, "values"])
        for line in content:
            values = " ".join(f"{value:.{line.decimals}f}" for value in line.last)
            writer.writerow([line.pair, line.metric, *line.cells(), values])
    draw(content, figure)
    return [markdown, plain, figure]


def draw(content: Sequence[Line], target: Path) -> None:
    """Draw every row as a dot with its seeds, beside the paper's figure.

    Args:
        content: lines of the table.
        target: PNG file.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((line.pair, line.metric) for line in content))
    height = 1.2 + 0.3 * len(content) / len(panels)
    figure, grid = plt.subplots(len(panels), figsize=(8, height * len(panels)), layout="constrained", squeeze=False)
    for axes, (pair, metric) in zip(grid[:, 0], panels, strict=True):
        own = [line for line in content if (line.pair, line.metric) == (pair, metric)]
        for place, line in enumerate(own):
            if line.paper is not None:
                axes.plot(line.paper, place, "D", color="0.5", fillstyle="none", label="paper")
            if line.last:
                axes.plot(line.last, [place] * len(line.last), ".", color="C0", alpha=0.5, label="ours, one seed")
                axes.plot(statistics.fmean(line.last), place, "o", color="C0", label="ours, mean of the last epochs")
            ours = line.spread(line.last) if line.last else line.failed or NOT_RUN
            axes.annotate(
                f"{ours}" + (f" (n={len(line.last)})" if line.last else ""),
                (1.01, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
            )
        axes.set_yticks(range(len(own)), [line.label for line in own])
        axes.set_ylim(len(own) - 0.5, -0.5)
        axes.set_title(f"{pair}, {METRIC_NAMES[metric]}", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    by_label: dict[str, Any] = {}
    for axes in grid[:, 0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    if by_label:
        figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(target, dpi=120)
    plt.close(figure)


def write_records(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write ``results.json``: records of other runs that stand in it are kept as long as these runs are there.

    Args:
        records: of finished runs.
        path: the file.
    """
    known: dict[str, Any] = {}
    if path.is_file():
        known = {each["run"]: each for each in json.loads(path.read_text(encoding="utf-8"))}
    known |= {each["run"]: each for each in records}
    write_json([each for run, each in known.items() if (Path(run) / "summary.json").is_file()], path)
