"""Figures of a run, drawn from its ``metrics.csv``."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter, MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.files import CURVES, LEARNERS
from ackd_lightning.writing import whole_file

Metrics = Mapping[str, Mapping[int, float]]
"""Value by epoch, from 1, of each metric."""

_WIDE = 50.0
"""Ratio of the largest value to the smallest one from which an axis is logarithmic."""
_LOSS = {"train": "all terms"}
"""What the loss of a split is; that of the others is the cross-entropy."""
_NETWORK = re.compile(r"(val|test)/(aux\d+_|group_|ensemble_|teacher_)?acc")


def short(name: str, most: int = 22) -> str:
    """Return a class name that fits beside a figure.

    Args:
        name: Class name.
        most: Largest number of characters.
    """
    return name if len(name) <= most else f"{name[: most - 1]}…"


def visible(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> NDArray[np.float32]:
    """Undo the normalisation of images for a figure.

    Args:
        images: ``N x C x H x W`` normalised; the first three channels are shown, and of one or two the first.
        mean: Mean of each channel. If it is None, the images are scaled so that their extremes are 0 and 1.
        std: Standard deviation of each channel, as ``mean``.

    Returns:
        ``N x H x W x 3`` from 0 to 1.
    """
    raw = images.detach().float().cpu()
    if mean and std:
        centre, scale = (torch.tensor([*each]).view(1, -1, 1, 1) for each in (mean, std))
        raw = raw * scale + centre
    else:
        low, high = raw.min(), raw.max()
        raw = (raw - low) / (high - low).clamp_min(1e-6)
    raw = raw[:, :3] if raw.shape[1] >= 3 else raw[:, :1].expand(-1, 3, -1, -1)
    found: NDArray[np.float32] = raw.clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()
    return found


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Read the metrics of every epoch; of an epoch that was repeated after a resume, the last values.

    Args:
        path: ``metrics.csv`` of a run.

    Returns:
        Values by the name of the metric and by epoch, from 1. Learning rates are those of the start of an epoch.

    Raises:
        ACKDError: If the file cannot be read.
    """
    found: dict[str, dict[int, float]] = {}
    waiting: dict[str, float] = {}  # learning rates, whose rows have no epoch and come before those of their epoch
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                values = {key: float(value) for key, value in row.items() if value and key not in ("epoch", "step")}
                if not row["epoch"]:
                    waiting |= values
                    continue
                epoch = int(row["epoch"]) + 1
                for key, value in {**waiting, **values}.items():
                    found.setdefault(key, {})[epoch] = value
                waiting = {}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ACKDError(f"{path} cannot be read ({str(error)[:120]}); remove it to leave out its curve") from error
    return found


def new_figure(width: float, height: float = 4.0, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels side by side that needs no window and leaves matplotlib's settings alone.

    Args:
        width: Width in inches.
        height: Height in inches.
        panels: Number of panels.
    """
    figure = Figure(figsize=(width, height), dpi=100)
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    # margins by hand: layout engines draw everything twice
    left, right = 0.6 / width, 1 - 0.15 / width
    figure.subplots_adjust(left, 0.5 / height, right, 1 - 0.35 / height, wspace=0.55 * panels / width)
    for each in axes:
        each.grid(alpha=0.3)
        each.set_xlabel("epoch")
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all.

    Args:
        figure: Figure.
        path: Image file (PNG, PDF or SVG).
    """
    with whole_file(path) as partial:
        write_figure(figure, partial, path.suffix[1:].lower())


def write_figure(figure: Figure, target: Path | BinaryIO, kind: str = "png", **options: Any) -> None:
    """Write a figure with names as they are: a dollar sign in them begins no formula.

    Args:
        figure: Figure.
        target: File, or stream of bytes.
        kind: Format of the image, such as ``png``.
        options: Options of ``savefig``.
    """
    logarithmic = [each for each in figure.findobj(Axis) if isinstance(each.get_major_formatter(), LogFormatter)]
    powers = {text for axis in logarithmic for text in axis.findobj(Text) if text is not axis.label}
    for text in {*figure.findobj(Text)} - powers:
        text.set_parse_math(False)
    figure.savefig(target, format=kind, **options)


def draw_run(run: Path) -> list[Path]:
    """Draw accuracy, loss and learning rates, and the learners of a method that has several, into a run's folder.

    Args:
        run: Folder of a run with a ``metrics.csv``.

    Returns:
        Files that were written.

    Raises:
        ACKDError: If ``metrics.csv`` cannot be read.
    """
    metrics = read_metrics(run / "metrics.csv")
    written = []
    for name, panels in ((CURVES, _curves(metrics)), (LEARNERS, _learners(metrics))):
        shown = {title: lines for title, lines in panels.items() if lines}
        if not shown:
            continue
        figure, axes = new_figure(4.5 * len(shown), 3.6, len(shown))
        for place, (title, lines) in zip(axes, shown.items(), strict=True):
            _draw(place, title, lines)
        save_figure(figure, run / name)
        written.append(run / name)
    return written


def _curves(metrics: Metrics) -> dict[str, Metrics]:
    losses = _splits(metrics, "loss")
    return {
        "accuracy in %": _percent(_splits(metrics, "acc")),
        "loss": {f"{split}, {_LOSS.get(split, 'cross-entropy')}": each for split, each in losses.items()},
        "learning rate": _merged({key.removeprefix("lr/"): metrics[key] for key in metrics if key.startswith("lr/")}),
    }


def _merged(lines: Metrics) -> dict[str, Mapping[int, float]]:
    """Make one line of those that are equal, with all their names."""
    names: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, values in lines.items():
        names.setdefault(tuple(values.items()), []).append(name)
    return {", ".join(each): dict(values) for values, each in names.items()}


def _splits(metrics: Metrics, name: str) -> dict[str, Mapping[int, float]]:
    """A metric on every split."""
    found = {key: re.fullmatch(rf"(train|val\d*|test)/{name}", key) for key in metrics}
    return {match[1]: metrics[key] for key, match in found.items() if match}


def _learners(metrics: Metrics) -> dict[str, Metrics]:
    matches = [(key, match) for key in metrics if (match := _NETWORK.fullmatch(key))]
    networks = {f"{match[1]}, {(match[2] or 'student').removesuffix('_')}": metrics[key] for key, match in matches}
    several = any("aux" in name or "group" in name for name in networks)
    attention = {key.split("/attention_")[1]: metrics[key] for key in metrics if "/attention_" in key}
    right = metrics.get("train/disc_acc")
    return {
        "accuracy in %": _percent(networks) if several else {},
        "attention: weights, and entropy in nats": attention,
        "accuracy of the discriminators in %": _percent({"train": right}) if right else {},
    }


def _percent(lines: Metrics) -> dict[str, dict[int, float]]:
    return {name: {epoch: 100 * value for epoch, value in values.items()} for name, values in lines.items()}


def _draw(axes: Axes, title: str, lines: Metrics) -> None:
    axes.set_title(title, fontsize=10)
    for name, values in sorted(lines.items()):
        teacher = name.endswith("teacher")
        if teacher and len(values) == 1:  # a frozen one is measured once, before the first step
            axes.axhline(next(iter(values.values())), linestyle="--", color="0.4", label=name, linewidth=1.4)
            continue
        style = ".--" if teacher or name.startswith("train") else ".-"
        axes.plot(list(values), list(values.values()), style, label=name, linewidth=1.4, markersize=4)
    axes.legend(fontsize=8)
    every = [value for values in lines.values() for value in values.values() if math.isfinite(value)]
    if title in ("loss", "learning rate") and every and 0 < min(every) < max(every) / _WIDE:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
