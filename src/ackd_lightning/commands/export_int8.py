"""What ``ackd export --int8`` refuses and prints."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ackd_lightning.deploy.checking import SINGLE, CheckImages
from ackd_lightning.deploy.formats.formats import Format
from ackd_lightning.deploy.int8 import BACKENDS, NOTEWORTHY_IMAGES, NOTEWORTHY_LOSS, Measured
from ackd_lightning.deploy.latency import PTE_THREADS
from ackd_lightning.errors import ACKDError
from ackd_lightning.extras import require
from ackd_lightning.runs.console import show_table
from ackd_lightning.runs.files import STUDENT

_SLOWER = 1.2
"""Ratio of the times of int8 and float32 from which on it is said."""


def check_int8(kinds: Sequence[Format], calibrate: int | None, learner: int) -> None:
    """Refuse options that do not go with ``--int8``.

    Args:
        kinds: Formats.
        calibrate: Number of training images to calibrate on; None where it is not given.
        learner: Number of the learner.

    Raises:
        ACKDError: Naming the option.
    """
    without = [each.name for each in kinds if each.name not in BACKENDS]
    if without:
        raise ACKDError(f"--int8 is given and format {without[0]} has no int8; choose from {', '.join(BACKENDS)}")
    require("torchao", "quantization", "--int8")
    if calibrate is not None and calibrate < 1:
        raise ACKDError(f"--calibrate is {calibrate}; give the number of training images, such as 512")
    if learner:
        raise ACKDError(
            f"--int8 is given and --learner is {learner}; leave one of them out, as the student alone has int8"
        )


def int8_advice(folder: Path, summary: Mapping[str, Any], *, tuned: bool) -> str:
    """Say what can be done about an int8 network that lost accuracy.

    Args:
        folder: Folder of the run.
        summary: Summary of the run; empty without one.
        tuned: Whether the student was fine-tuned for int8 already.
    """
    if tuned:
        return "it was fine-tuned for int8 already; more epochs or another --model.student.quantization may help"
    files = [folder / name for name in ("config.yaml", STUDENT)]
    if not all(each.is_file() for each in files):
        return "fine-tune its student with --config qat.yaml"
    settings, weights = (shlex.quote(str(each)) for each in files)
    method = "" if summary.get("teacher") else " --config ce.yaml"  # kd needs a teacher
    return (
        f"fine-tune it: ackd fit --config {settings} --config qat.yaml{method} --model.student.pretrained false "
        f"--model.student.weights {weights}"
    )


def show_int8(
    kinds: Sequence[Format],
    targets: Sequence[Path],
    export: Callable[[Format, Path], tuple[Measured, Measured]],
    *,
    images: CheckImages,
    advice: str,
) -> None:
    """Write a file in each format, and print float32 and int8 side by side.

    Args:
        kinds: Formats.
        targets: File of each format.
        export: Function that writes a file, and returns what was measured of float32 and int8.
        images: Images of the check.
        advice: What to do about lost accuracy.

    Raises:
        ACKDError: If a file was not written, after the others.
    """
    table = Table()
    for column in ("network", "MB", "same class", "accuracy", "ms an image", "spread"):
        table.add_column(column, justify="left" if column == "network" else "right", overflow="fold")
    failures, written, notes, threads = [], [], [], 1
    for kind, target in zip(kinds, targets, strict=True):
        try:
            pair = export(kind, target)
        except ACKDError as error:
            failures.append(str(error))
            continue
        written.append(str(target))
        for each in pair:
            accuracy = "-" if each.accuracy is None else f"{each.accuracy:.2%}"
            time = (f"{1000 * each.latency.median:.3f}", f"{1000 * each.latency.spread:.3f}")
            table.add_row(each.name, f"{each.size / 1e6:.2f}", f"{each.agreement:.2%}", accuracy, *time)
            threads = each.latency.threads
        if pair[1].single:
            notes.append(SINGLE.format(target.name))
        before, after = (each.accuracy for each in pair)
        if before is not None and after is not None:
            fewer = round((before - after) * images.counted)
            if before - after > NOTEWORTHY_LOSS and fewer >= NOTEWORTHY_IMAGES:
                notes.append(
                    f"{target.name} is right for {fewer:,} fewer of {images.counted_words} ({after:.2%} instead of "
                    f"{before:.2%}); {advice}"
                )
        times = [each.latency.median for each in pair]
        if times[1] > _SLOWER * times[0]:
            notes.append(
                f"on this machine int8 takes {times[1] / times[0]:.1f} times as long as float32 in {kind.name}; "
                "docs/quantization.md says where it is fast"
            )
    if table.row_count:
        show_table(table)
        print(
            f"one image at a time, {threads} {'thread' if threads == 1 else 'threads'}, median and interquartile range"
        )
        if any(each.endswith(".pte") for each in written):
            print(PTE_THREADS)
        print(f"written: {', '.join(written)}; float32 files were made for the comparison alone, others are unchanged")
    for line in notes:
        print(line)
    if failures:
        raise ACKDError("\n".join(failures))
