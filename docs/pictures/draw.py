"""Draw the diagrams of the documentation: `python docs/pictures/draw.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
COLORS = {"plain": "#e8eaf6", "teacher": "#fff3e0", "aux": "#e0f2f1", "loss": "#fce4ec", "kept": "#c5cae9"}
mpl.rcParams |= {"svg.hashsalt": "ackd", "font.size": 10, "svg.fonttype": "path", "mathtext.fontset": "cm"}


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure whose units are tenths of an inch."""
    figure = Figure(figsize=(width / 10, height / 10))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """Draw a box with its lower left corner at (x, y)."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", facecolor=COLORS[color], edgecolor="#37474f"
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="#212121")


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    *,
    loss: bool = False,
    at: tuple[float, float] = (0, 0),
    bend: float = 0.0,
) -> None:
    """Draw an arrow; losses are dashed and red."""
    color = "#c2185b" if loss else "#37474f"
    style = {"arrowstyle": "-|>", "color": color, "linestyle": "--" if loss else "-", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, "connectionstyle": f"arc3,rad={bend}"})
    if text:
        x, y = (start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1]
        background = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(x, y, text, color=color, ha="center", va="center", fontsize=9, bbox=background)


def step() -> Figure:
    """One training step of ACKD: who learns what from whom."""
    figure, axes = canvas(92, 50)
    box(axes, 1, 21, 9, 6, "image", "plain")
    box(axes, 16, 41, 14, 6, "teacher, frozen", "teacher")
    box(axes, 16, 21, 14, 6, "student:\nshared stages", "plain")
    box(axes, 38, 31, 17, 6, "auxiliary learner\n$h_1$, $z_1$", "aux")
    box(axes, 38, 21, 17, 6, "auxiliary learner\n$h_2$, $z_2$", "aux")
    box(axes, 38, 8, 17, 6, "target learner\n$z_s$", "kept")
    box(axes, 36.5, 1, 20, 4, "export: the plain student", "kept")
    box(axes, 64, 26, 20, 6, "attention (Eq. 3):\ngroup $z_a = a_1 z_1 + a_2 z_2$", "aux")
    box(axes, 64, 16, 20, 5, "discriminators (Eq. 4, 5)", "aux")
    arrow(axes, (10, 25), (16, 43))
    arrow(axes, (10, 24), (16, 24))
    arrow(axes, (30, 25), (38, 34))
    arrow(axes, (30, 24), (38, 24))
    arrow(axes, (30, 23), (38, 11))
    arrow(axes, (55, 34), (64, 30))
    arrow(axes, (55, 25), (64, 28))
    arrow(axes, (55, 32), (64, 20))
    arrow(axes, (55, 22), (64, 19))
    arrow(axes, (46.5, 8), (46.5, 5))
    arrow(axes, (30, 45), (74, 32), "Eq. 2: the teacher teaches the group", loss=True, at=(2, 2), bend=-0.15)
    axes.plot([84, 88, 88], [29, 29, 11], color="#c2185b", linestyle="--", linewidth=1)
    arrow(axes, (88, 11), (55, 11), "Eq. 6: the group teaches the target", loss=True, at=(0, 2))
    for y in (37, 27, 14):
        axes.text(55, y + 1.2, "labels: CE", color="#c2185b", ha="right", va="center", fontsize=8)
    return figure


def branches() -> Figure:
    """Branches D3B1 and D2B2 on a network of three stages."""
    figure, axes = canvas(84, 36)
    names = ["stem", "stage 1", "stage 2", "stage 3", "pool,\nclassifier"]
    for number, name in enumerate(names):
        box(axes, 10 + 15 * number, 24, 11, 6, name, "kept")
        arrow(axes, (6.5 + 15 * number, 27), (10 + 15 * number, 27))
    axes.text(2, 27, "image", va="center")
    arrow(axes, (81, 27), (83.5, 27))
    for row, (label, start, stages) in enumerate([("D3B1", 3, 1), ("D2B2", 2, 2)]):
        y = 13 - 11 * row
        x = 10 + 15 * start - 2
        axes.plot([x, x], [27, y + 3], color="#37474f", linewidth=1)
        for each in range(stages):
            box(axes, 10 + 15 * (start + each), y, 11, 6, f"stage {start + each}", "aux")
            left = x if each == 0 else 10 + 15 * (start + each) - 4
            arrow(axes, (left, y + 3), (10 + 15 * (start + each), y + 3))
        box(axes, 70, y, 11, 6, "pool,\nclassifier", "aux")
        arrow(axes, (66, y + 3), (70, y + 3))
        axes.text(x - 1.5, y + 3, label, ha="right", va="center", family="monospace")
    axes.text(10, 33, "student, exported", color="#303f9f", va="center")
    axes.text(2, 4, "auxiliary learners:\nfresh weights, dropped\nafter training", color="#00695c", va="center")
    return figure


def atsc() -> Figure:
    """One training step of ATSC: a teacher that adapts, and one classifier for both."""
    figure, axes = canvas(92, 36)
    box(axes, 1, 14, 9, 6, "image", "plain")
    box(axes, 16, 24, 15, 7, "teacher: a copy\nthat adapts", "teacher")
    box(axes, 16, 4, 15, 7, "student", "kept")
    box(axes, 42, 24, 10, 7, "map $F_t$", "teacher")
    box(axes, 42, 4, 10, 7, "projector", "kept")
    box(axes, 66, 14, 15, 7, "teacher's\nclassifier", "kept")
    arrow(axes, (10, 18), (16, 27))
    arrow(axes, (10, 16), (16, 8))
    arrow(axes, (31, 27.5), (42, 27.5))
    arrow(axes, (31, 7.5), (42, 7.5), "$F_s$", at=(0, 1.5))
    arrow(axes, (52, 26), (66, 19))
    arrow(axes, (52, 9), (66, 16))
    arrow(axes, (81, 17.5), (88, 17.5))
    axes.text(85, 20, "prediction", ha="center")
    arrow(axes, (47, 24), (47, 11), loss=True)
    arrow(axes, (47, 11), (47, 24), "features: squared distance,\ngradient to both sides", loss=True)
    arrow(axes, (23.5, 35), (23.5, 31), loss=True)
    axes.text(24.5, 33.5, "anchor: the teacher as given", color="#c2185b", fontsize=9, va="center")
    arrow(axes, (73.5, 29), (73.5, 21), "labels, in a step of its own", loss=True, at=(0, 5))
    axes.text(1, 1, "exported: student, projector and classifier", color="#303f9f", va="center")
    return figure


def acn() -> Figure:
    """One training step of ACN: a generator makes images on which the classifiers disagree."""
    figure, axes = canvas(92, 34)
    box(axes, 1, 20, 9, 6, "image $x$", "plain")
    box(axes, 1, 6, 9, 6, "noise $e$", "plain")
    box(axes, 18, 12, 13, 6, "generator", "aux")
    box(axes, 38, 12, 15, 6, "generated image:\n$x$ and a residual", "aux")
    box(axes, 62, 24, 16, 6, "image discriminator", "aux")
    box(axes, 62, 6, 16, 6, "classifiers 1 … n", "kept")
    arrow(axes, (10, 22), (18, 16))
    arrow(axes, (10, 9), (18, 14))
    arrow(axes, (31, 15), (38, 15))
    arrow(axes, (10, 24), (45, 18), "share $\\rho$", at=(0, 1.5))
    arrow(axes, (10, 25.5), (62, 28.5), "real", at=(0, 1))
    arrow(axes, (53, 17), (62, 25), "generated", at=(-1, 1))
    arrow(axes, (53, 14), (62, 10))
    arrow(axes, (86, 14), (78, 10), "labels; each other,\nalso on generated images", loss=True, at=(0, 5))
    arrow(
        axes,
        (62, 8),
        (24, 12),
        "they disagree, up to a cap; their mean knows the label",
        loss=True,
        at=(0, -5),
        bend=-0.25,
    )
    arrow(axes, (78, 28), (86, 28), loss=True)
    axes.text(82, 31.5, "looks real:\nto the generator", color="#c2185b", ha="center", fontsize=9)
    return figure


def aikd() -> Figure:
    """One training step of AI-KD: a pretrained student, the student of the epoch before, and a discriminator."""
    figure, axes = canvas(92, 34)
    box(axes, 1, 14, 9, 6, "image", "plain")
    box(axes, 20, 25, 20, 6, "pretrained student, frozen", "teacher")
    box(axes, 20, 14, 20, 6, "student, exported", "kept")
    box(axes, 20, 2, 20, 6, "student of the epoch before", "teacher")
    box(axes, 66, 19, 20, 7, "discriminator\non predictions", "aux")
    arrow(axes, (10, 18), (20, 27))
    arrow(axes, (10, 17), (20, 17))
    arrow(axes, (10, 16), (20, 6))
    arrow(axes, (40, 28), (66, 24.5), "real", at=(0, 1))
    arrow(axes, (40, 18), (66, 21.5), "not real", at=(0, 1.2))
    arrow(axes, (30, 25), (30, 20), "KL at temperature 4", loss=True, at=(10, 0))
    arrow(axes, (30, 8), (30, 14), "$\\alpha_t$: targets of the epoch before", loss=True, at=(13, -1.5))
    arrow(axes, (76, 19), (40, 15.5), "look pretrained", loss=True, at=(4, -1.5))
    arrow(axes, (66, 9), (40, 14.5), "$1 - \\alpha_t$: labels", loss=True, at=(10, -1))
    return figure


if __name__ == "__main__":
    for draw in (step, branches, atsc, acn, aikd):
        draw().savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None})
