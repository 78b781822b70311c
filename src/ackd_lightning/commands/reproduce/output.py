"""Files with the results of a table: ``results.json``, and the table as Markdown, CSV and PNG."""

from __future__ import annotations

import csv
import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib.figure import Figure

from ackd_lightning.commands.reproduce.results import NOT_RUN, Line
from ackd_lightning.commands.reproduce.specs import TableSpec
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.figures import write_figure
from ackd_lightning.runs.files import write_json
from ackd_lightning.writing import whole_file, write_whole

_COLUMNS = ["row", "paper", "ours, last", "95 % interval", "ours, best", "n", "minus paper"]
METRIC_NAMES = {
    "acc": "top-1 accuracy in %",
    "acc_top5": "top-5 accuracy in %",
    "cka": "linear CKA of the embeddings",
    "kl": "KL divergence in nats",
    "proxy": "accuracy and gap in %",
}


def columns(against: str | None) -> list[str]:
    """Return the headings of a table.

    Args:
        against: Row of reference; None for none.
    """
    return [*_COLUMNS, *([f"minus {against} (95 %)"] if against else [])]


def write_tables(
    table: TableSpec, content: Sequence[Line], out: Path, text: str, against: str | None = None
) -> list[Path]:
    """Write a table as Markdown, CSV and PNG.

    Args:
        table: Table of the paper.
        content: Lines of the table.
        out: Folder for the files.
        text: Note below the table.
        against: Row of reference.

    Returns:
        Paths of the files.
    """
    markdown, plain, figure = (out / f"{table.name}.{suffix}" for suffix in ("md", "csv", "png"))
    parts, heads = [f"# {table.title}", ""], columns(against)
    for metric in dict.fromkeys(line.metric for line in content):
        for pair in dict.fromkeys(line.pair for line in content):
            own = [line for line in content if (line.pair, line.metric) == (pair, metric)]
            parts += [f"## {pair}, {METRIC_NAMES[metric]}", ""]
            parts += [_row(heads), f"|{'---|' * len(heads)}"]
            parts += [_row(line.cells()[: len(heads)]) for line in own] + [""]
    write_whole("\n".join([*parts, text, ""]), markdown)
    with whole_file(plain) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["pair", "metric", *heads, "values"])
        for line in content:
            values = " ".join(f"{value:.{line.decimals}f}" for value in line.last)
            writer.writerow([line.pair, line.metric, *line.cells()[: len(heads)], values])
    draw(content, figure)
    return [markdown, plain, figure]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def draw(content: Sequence[Line], target: Path) -> None:
    """Draw every row that was run or stands in the paper: the mean, the single seeds, and the figure of the paper.

    Args:
        content: Lines of the table.
        target: PNG file to write.
    """
    content = [line for line in content if line.paper is not None or line.ours != NOT_RUN] or content
    panels = list(dict.fromkeys((line.pair, line.metric) for line in content))
    labels = {line.label: textwrap.fill(line.label, 44) for line in content}
    lines_of_label = max(label.count("\n") + 1 for label in labels.values())
    height = 1.2 + (0.14 + 0.16 * lines_of_label) * len(content) / len(panels)
    figure = Figure(figsize=(8, height * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False)
    for axes, (pair, metric) in zip(grid[:, 0], panels, strict=True):
        own = [line for line in content if (line.pair, line.metric) == (pair, metric)]
        for place, line in enumerate(own):
            if line.paper is not None:
                axes.plot(line.paper, place, "D", color="0.5", fillstyle="none", label="paper")
            if line.last:
                axes.plot(line.last, [place] * len(line.last), ".", color="C0", alpha=0.5, label="ours, one seed")
                axes.plot(statistics.fmean(line.last), place, "o", color="C0", label="ours, mean of the last epochs")
            axes.annotate(
                line.ours + (f" (n={len(line.last)})" if line.last else ""),
                (1.01, place),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
            )
        axes.set_yticks(range(len(own)), [labels[line.label] for line in own], fontsize=8)
        axes.set_ylim(len(own) - 0.5, -0.5)
        axes.set_title(f"{pair}, {METRIC_NAMES[metric]}", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    by_label: dict[str, Any] = {}
    for axes in grid[:, 0]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            by_label.setdefault(label, handle)
    if by_label:
        figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=3, fontsize=8)
    with whole_file(target) as partial:
        write_figure(figure, partial, dpi=120)


def write_records(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Update ``results.json``: records of other runs, and of other pairs, are kept as long as those runs exist.

    Args:
        records: Records of finished runs.
        path: File to write.

    Raises:
        ACKDError: If the file is damaged.
    """
    every = [*read_records(path), *records]
    known = {(each["run"], each["pair"], each["row"]): each for each in every}
    write_json([each for each in known.values() if (path.parent / each["run"] / "summary.json").is_file()], path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read ``results.json``.

    Args:
        path: The file; without it there are no records.

    Raises:
        ACKDError: If the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(found, list) and all({"run", "pair", "row"} <= each.keys() for each in found)
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise ACKDError(f"{path} is damaged: remove it, and the table is written again from the runs")
    return cast("list[dict[str, Any]]", found)
