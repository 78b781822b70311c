"""What ``ackd test`` and ``ackd validate`` print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from torch import Tensor

from ackd_lightning.metrics.intervals import TOP5_CLASSES, share_text
from ackd_lightning.runs.answers import Answers
from ackd_lightning.runs.console import show_table

_TOP5, _ACCURACY = "acc_top5", "acc"


def show_measured(
    metrics: Mapping[str, Tensor | float],
    command: str,
    checkpoint: Path,
    *,
    classes: int,
    answers: Answers | None = None,
) -> None:
    """Print the accuracy of every network of a run, and whatever else was measured.

    Args:
        metrics: Values by name, such as ``test/acc`` and ``test/aux1_acc``; those of further loaders begin with
            ``test2/`` and so on.
        command: ``test`` or ``validate``.
        checkpoint: Checkpoint that was measured.
        classes: Number of classes; top-5 accuracy is shown for `TOP5_CLASSES` or more.
        answers: Predictions of the test set, for an interval; None when they are not known.
    """
    values = {key: float(value) for key, value in metrics.items()}
    top5 = classes >= TOP5_CLASSES and any(key.endswith(_TOP5) for key in values)
    table = Table()
    table.add_column("network")
    for column in ("accuracy in %", "top-5 in %") if top5 else ("accuracy in %",):
        table.add_column(column, justify="right")
    others = []
    for key, value in values.items():
        part, _, name = key.partition("/")
        if name.endswith(_ACCURACY):
            network = name.removesuffix(_ACCURACY).rstrip("_") or "student"
            further = values.get(f"{key}_top5")
            row = [f"{100 * value:.2f}", *([] if not top5 else ["-" if further is None else f"{100 * further:.2f}"])]
            table.add_row(network if part in ("test", "val") else f"{network} ({part})", *row)
        elif not name.endswith(_TOP5):
            others.append(f"{name if part in ('test', 'val') else key} {value:.4g}")
    if table.row_count:
        print(f"{command}, {checkpoint}:")
        show_table(table)
    if answers is not None and len(answers):
        print(f"accuracy {share_text(int(answers.right.sum()), len(answers))} of {len(answers):,} test images")
    if others:
        print(f"also measured: {', '.join(others)}", flush=True)
