"""Figures of a report, as PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ackd_lightning.metrics.calibration import BINS, Reliability
from ackd_lightning.runs.figures import short, write_figure

_BLUE, _RED, _GREY, _INK = "#2f6db3", "#c8502d", "#b9bec6", "#2b2f36"
_DPI = 130
_MAX_CLASSES = 40
"""Number of classes up to which each has a label in a figure."""


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    write_figure(figure, buffer)
    return buffer.getvalue()


def _plain(axes: object) -> None:
    """Remove the frame's upper and right line."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)  # type: ignore[attr-defined]


def per_class(shares: Sequence[float], intervals: Sequence[tuple[float, float]], names: Sequence[str]) -> bytes:
    """Draw the accuracy of each class with its interval, the best on top.

    Args:
        shares: Accuracy of each class, from 0 to 1.
        intervals: 95 % interval of each.
        names: Name of each class.
    """
    order = sorted(range(len(names)), key=lambda each: shares[each])
    values = 100 * np.array([shares[each] for each in order])
    ends = 100 * np.array([intervals[each] for each in order])
    margins = np.abs(np.stack([values - ends[:, 0], ends[:, 1] - values]))
    mean = float(np.mean(values))
    if len(names) <= _MAX_CLASSES:
        figure = _figure(7.2, 0.9 + 0.26 * len(names))
        axes = figure.subplots()
        places = np.arange(len(names))
        axes.barh(places, values, color=_BLUE, height=0.66, alpha=0.85)
        axes.errorbar(values, places, xerr=margins, fmt="none", ecolor=_INK, elinewidth=0.9, capsize=2)
        axes.set_yticks(places, [short(names[each]) for each in order], fontsize=8, parse_math=False)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.axvline(mean, color=_RED, linewidth=1, linestyle="--")
        axes.text(
            mean, len(names) - 0.4, f" mean of classes {mean:.1f}", color=_RED, fontsize=8, va="bottom", ha="center"
        )
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy in %, with 95 % interval")
    else:
        figure = _figure(7.2, 3.4)
        axes = figure.subplots()
        places = np.arange(len(names))
        axes.fill_between(places, ends[:, 0], ends[:, 1], color=_BLUE, alpha=0.2, linewidth=0, label="95 % interval")
        axes.plot(places, values, color=_BLUE, linewidth=1.5)
        axes.axhline(mean, color=_RED, linewidth=1, linestyle="--", label=f"mean of classes {mean:.1f} %")
        axes.set_xlim(0, len(names) - 1)
        axes.set_ylim(0, 101)
        axes.set_xlabel(f"{len(names):,} classes, sorted")
        axes.set_ylabel("accuracy in %")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    _plain(axes)
    return _png(figure)


def confusion(matrix: NDArray[np.int64], names: Sequence[str]) -> bytes:
    """Draw a confusion matrix, in percent of each row.

    Args:
        matrix: ``K x K`` counts, true classes in rows.
        names: Name of each class.
    """
    count = len(names)
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    labelled = count <= _MAX_CLASSES
    side = max(3.6, 1.8 + 0.34 * count) if labelled else 6.4
    figure = _figure(min(side, 12.0) + 0.5, min(side, 12.0))
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if labelled:
        size = 8 if count <= 20 else 6
        axes.set_xticks(range(count), [short(each) for each in names], rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(count), [short(each) for each in names], fontsize=size, parse_math=False)
    if count <= 20:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[row, column] > 30 else _INK
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.tick_params(length=0)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="% of the true class", pad=0.02)
    return _png(figure)


def reliability(panels: Sequence[tuple[str, Reliability]]) -> bytes:
    """Draw reliability diagrams with the distribution of the confidence below them.

    Args:
        panels: Title and points of each diagram.
    """
    figure = _figure(3.9 * len(panels) + 0.4, 4.8)
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    edges = np.arange(BINS) / BINS
    for column, (title, bins) in enumerate(panels):
        upper, lower = grid[0][column], grid[1][column]
        accuracy, confidence = bins.accuracy.nan_to_num().numpy(), bins.confidence.nan_to_num().numpy()
        full = bins.count.numpy() > 0
        low, gap = np.minimum(accuracy, confidence), np.abs(accuracy - confidence)  # 0 in empty bins
        options = {"width": 1 / BINS, "align": "edge", "linewidth": 0.6, "edgecolor": "white"}
        over, under = full & (confidence > accuracy), full & (accuracy > confidence)
        upper.bar(edges, low, color=_BLUE, alpha=0.9, label="accuracy", **options)
        upper.bar(
            edges[under],
            gap[under],
            bottom=low[under],
            color=_BLUE,
            alpha=0.45,
            label="not confident enough",
            **options,
        )
        upper.bar(edges[over], gap[over], bottom=low[over], color=_RED, alpha=0.35, label="too confident", **options)
        upper.plot([0, 1], [0, 1], color=_INK, linewidth=0.9, linestyle="--", label="perfect calibration")
        upper.set_title(title, fontsize=10)
        upper.set_ylim(0, 1)
        lower.bar(edges, bins.count.numpy() / max(1, int(bins.count.sum())), color=_GREY, **options)
        lower.set_xlabel("confidence")
        lower.set_xlim(0, 1)
        lower.set_ylim(0, 1)
        for axes in (upper, lower):
            _plain(axes)
    grid[0][0].set_ylabel("accuracy")
    grid[1][0].set_ylabel("share of images")
    entries = {label: each for axes in grid[0] for each, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    grid[0][0].legend(list(entries.values()), list(entries), frameon=False, fontsize=8, loc="upper left")
    return _png(figure)


def mistakes(images: NDArray[np.float32], captions: Sequence[tuple[str, str, str]]) -> bytes:
    """Draw images with what they are and what the network took them for.

    Args:
        images: ``N x H x W x 3`` from 0 to 1.
        captions: True class, predicted class with its probability, and the name of the file for each image.
    """
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    width, height = 1.75 * columns, 2.35 * rows  # inches; the side of an image is 1.65
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    for place, (true, predicted, file) in enumerate(captions):
        row, column = divmod(place, columns)
        left, top = 1.75 * column + 0.05, height - 2.35 * row - 0.05
        axes = figure.add_axes((left / width, (top - 1.65) / height, 1.65 / width, 1.65 / height))
        axes.set_axis_off()
        axes.imshow(images[place], interpolation="nearest")
        tail = file if len(file) <= 28 else f"…{file[-27:]}"
        lines = ((0.05, short(true, 24), 8, _INK), (0.24, short(predicted, 28), 8, _RED), (0.43, tail, 6, "#777c85"))
        for below, text, size, color in lines:
            figure.text(
                (left + 0.825) / width,
                (top - 1.65 - below) / height,
                text,
                fontsize=size,
                color=color,
                ha="center",
                va="top",
                parse_math=False,
            )
    return _png(figure)


def heat_maps(
    images: NDArray[np.float32],
    columns: Sequence[tuple[str, NDArray[np.float32], Sequence[str]]],
    labels: Sequence[str],
) -> bytes:
    """Draw images in rows, and what each network looks at in columns.

    Args:
        images: ``N x H x W x 3`` from 0 to 1.
        columns: Name of each network, its overlays ``N x H x W x 3``, and its ``N`` predicted classes.
        labels: True class of each image.
    """
    width, height = 1.7 * (1 + len(columns)), 1.9 * len(images) + 0.25
    figure = _figure(width, height)
    grid = figure.subplots(len(images), 1 + len(columns), squeeze=False)
    for row, label in enumerate(labels):
        pictures = [("image", images[row], label, label)]
        pictures += [(name, overlays[row], answers[row], label) for name, overlays, answers in columns]
        for column, (name, picture, answer, true) in enumerate(pictures):
            axes = grid[row][column]
            axes.imshow(picture, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
            if row == 0:
                axes.set_title("\n".join(textwrap.wrap(name, 27)), fontsize=8, parse_math=False)
            color = _INK if answer == true else _RED
            axes.set_xlabel(short(answer, 24), fontsize=8, color=color, parse_math=False)
    return _png(figure)
