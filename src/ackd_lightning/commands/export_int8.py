"""What ``ackd export --int8`` refuses and prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ackd_lightning.deploy.formats.formats import Format
from ackd_lightning.deploy.int8 import BACKENDS, NOTEWORTHY_LOSS, Measured
from ackd_lightning.errors import ACKDError


def check_int8(kinds: Sequence[Format], calibrate: int, learner: int) -> None:
    """Refuse options that do not go with ``--int8``.

    Args:
        kinds: Formats.
        calibrate: Number of training images to calibrate on.
        learner: Number of the learner.

    Raises:
        ACKDError: Naming the option.
    """
    without = [each.name for each in kinds if each.name not in BACKENDS]
    if without:
        raise ACKDError(f"--int8 is given and format {without[0]} has no int8; choose from {', '.join(BACKENDS)}")
    if calibrate < 1:
        raise ACKDError(f"--calibrate is {calibrate}; give the number of training images, such as 512")
    if learner:
        raise ACKDError(
            f"--int8 is given and --learner is {learner}; leave one of them out, as the student alone has int8"
        )


def show_int8(
    kinds: Sequence[Format], targets: Sequence[Path], export: Callable[[Format, Path], tuple[Measured, Measured]]
) -> None:
    """Write a file in each format, and print float32 and int8 side by side.

    Args:
        kinds: Formats.
        targets: File of each format.
        export: Function that writes a file, and returns what was measured of float32 and int8.

    Raises:
        ACKDError: If a file was not written, after the others.
    """
    table = Table(title=f"files in {targets[0].parent}")
    for column in ("network", "MB", "same class", "accuracy", "ms an image", "spread"):
        table.add_column(column, justify="left" if column == "network" else "right", overflow="fold")
    failures, lost, threads = [], [], 1
    for kind, target in zip(kinds, targets, strict=True):
        try:
            pair = export(kind, target)
        except ACKDError as error:
            failures.append(str(error))
            continue
        for each in pair:
            accuracy = "-" if each.accuracy is None else f"{each.accuracy:.2%}"
            time = (f"{1000 * each.latency.median:.3f}", f"{1000 * each.latency.spread:.3f}")
            table.add_row(each.name, f"{each.size / 1e6:.2f}", f"{each.agreement:.2%}", accuracy, *time)
            threads = each.latency.threads
        before, after = (each.accuracy for each in pair)
        if before is not None and after is not None and before - after > NOTEWORTHY_LOSS:
            lost.append(
                f"{target.name} is right for {after:.2%} instead of {before:.2%}; fine-tuning with --config qat.yaml "
                "may win it back"
            )
    if table.row_count:
        Console(width=120).print(table)
        print(
            f"one image at a time, {threads} {'thread' if threads == 1 else 'threads'}, median and interquartile range"
        )
    for line in lost:
        print(line)
    if failures:
        raise ACKDError("\n".join(failures))
