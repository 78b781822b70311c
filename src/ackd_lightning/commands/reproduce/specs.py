"""What a table consists of: pairs of networks, and rows of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TeacherKind = Literal["teacher", "early_stopped", "assistant", "guides", "itself"]
TEACHER_KINDS: tuple[TeacherKind, ...] = ("teacher", "early_stopped", "assistant", "guides", "itself")


@dataclass(frozen=True)
class Pair:
    """A teacher and a student on a data set.

    Attributes:
        name: Name, such as ``resnet110_resnet20``.
        config: Configuration of its ACKD run.
        assistants: Networks between the two, the largest first. Each learns by KD from the one before it, the first
            from the teacher.
        early_stop: Epoch of the configured schedule at which ESKD's teacher stops.
        paper: Figures in percent by row, in the order of the metrics; named figures for a table of proxies.
        rows: Dotted settings of this pair's runs by row, such as the weights that a method's authors use for it.
    """

    name: str
    config: Path
    assistants: tuple[str, ...] = ()
    early_stop: int | None = None
    paper: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def figure(self, row: str, metric: int) -> float | None:
        """Figure of the paper; None where it has none.

        Args:
            row: Name of the row.
            metric: Index of the metric.
        """
        value = self.paper.get(row)
        if isinstance(value, Sequence):
            value = value[metric]
        return None if value is None or (metric and not isinstance(self.paper.get(row), Sequence)) else float(value)


@dataclass(frozen=True)
class Row:
    """A row of a table: a method and the network that it learns from.

    Attributes:
        name: Name, unique in the table.
        method: Fragment of ``configs/methods``, or several joined by ``+``, whose losses are added.
        teacher: The teacher, the early-stopped teacher, the last assistant, the teacher and all assistants, or the
            student itself, trained alone before.
        label: Printed name.
        settings: Dotted settings of its runs.
    """

    name: str
    method: str
    teacher: TeacherKind = "teacher"
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TableSpec:
    """A table to fill.

    Attributes:
        name: Stem of the file name.
        title: First comment of the file.
        metrics: ``acc``, ``acc_top5``.
        error: Whether the figures are errors (100 - accuracy).
        proxies: Whether the table compares proxies of the teacher (Table 1) instead of accuracies.
        pairs: Pairs by name.
        rows: Rows by name, in printed order.
        settings: Dotted settings of every run.
        teacher_settings: Dotted settings of teachers.
        student_settings: Dotted settings of assistants and students.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    error: bool
    proxies: bool
    pairs: dict[str, Pair]
    rows: dict[str, Row]
    settings: dict[str, Any]
    teacher_settings: dict[str, Any]
    student_settings: dict[str, Any]
