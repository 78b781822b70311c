"""Draw how far ACKD is from plain KD after trainings of several lengths, and what its target learner learns from.

``python benchmarks/draw_gap.py`` reads the records in ``benchmarks/results`` and writes ``docs/pictures/gap.svg``.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
SHORT = {"today": "ackd", "direct": "direct", "detached": "detached"}
LONG = {"today": "undetached", "direct": "direct_undetached", "detached": "ackd"}
RECORDS = {
    "tiny100-screen-3": SHORT,
    "tiny100-confirm-24": LONG,
    "tiny100-confirm": LONG,
    "tiny100-confirm-120": LONG,
    "tiny100-confirm-120-2": LONG,
}
"""Files of records, and their rows of today's default, with the direct term, and with the stop-gradient."""
REFERENCE = "kd_1_1"
LINES = {
    ("direct", "acc"): ("ACKD, direct term added", "#00838f", "-"),
    ("today", "group"): ("group of ACKD", "#c2185b", ":"),
    ("today", "acc"): ("ACKD", "#c2185b", "-"),
    ("detached", "acc"): ("ACKD with a stop-gradient in Eq. 6", "#8d6e63", "--"),
}
LEARNERS = {"teacher": ("teacher", "#f57c00", "-"), "group": ("group", "#8d6e63", ":")}
LEARNERS |= {"target": ("target learner", "#8d6e63", "--")}
mpl.rcParams |= {"svg.hashsalt": "ackd", "font.size": 10, "svg.fonttype": "path"}


def read(name: str) -> Any:
    """Return the content of a file of records."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def differences(setting: str, figure: str) -> dict[int, list[float]]:
    """Return a figure of a setting minus the accuracy of KD with the same seed, for each length in epochs."""
    found: dict[int, list[float]] = defaultdict(list)
    for name, rows in RECORDS.items():
        runs = read(name)["runs"]
        reference = {each["seed"]: each["acc"] for each in runs if each["row"] == REFERENCE}
        for each in runs:
            if each["row"] == rows[setting]:
                found[each["epochs"]].append(each[figure] - reference[each["seed"]])
    return found


def draw(axes: Axes, values: dict[int, list[float]], label: str, color: str, style: str) -> None:
    """Draw the means as a line and each value as a dot."""
    lengths = sorted(values)
    means = [statistics.fmean(values[each]) for each in lengths]
    axes.plot(lengths, means, style, color=color, label=label)
    for each in lengths:
        axes.plot([each] * len(values[each]), values[each], ".", color=color, markersize=5)


def main() -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(0, color="#212121", linewidth=1, label="KD, 1 CE + 1 KD")
    for (setting, key), (label, color, style) in LINES.items():
        draw(left, differences(setting, key), label, color, style)
    left.set(title="test accuracy minus that of KD, points", xlabel="epochs", ylim=(-10, 2), xticks=(12, 24, 60, 120))
    shares = read("tiny100-who-is-right")
    for name, (label, color, style) in LEARNERS.items():
        draw(right, {each["epochs"]: [each["train"][name]] for each in shares}, label, color, style)
    right.set(title="stop-gradient, seed 0: right on training images, %", xlabel="epochs", ylim=(0, 75))
    right.set_xticks(sorted({each["epochs"] for each in shares}))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(HERE.parent / "docs" / "pictures" / "gap.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
