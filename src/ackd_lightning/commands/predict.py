"""``ackd predict RUN|FILE --images``: classes of any images, by a run or an exported file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ackd_lightning.commands.student import chosen_device, open_any
from ackd_lightning.deploy.images import Notes, list_images
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.deploy.predictions import predict_images
from ackd_lightning.errors import ACKDError, UnreadableImagesError, count_of
from ackd_lightning.launch.preflight import check_predictions
from ackd_lightning.runs.files import Which
from ackd_lightning.runs.tables import check_ending, write_table

_SHOWN = 10
"""Number of images up to which the predictions are printed, too."""


def predict(
    run: str,
    *,
    images: Sequence[str],
    output: str = "predictions.csv",
    top: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    which: Which = "last",
    batch_size: int = 64,
    workers: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Predict images and write a table with a row for each.

    Args:
        run: Run folder, checkpoint or exported file.
        images: Folders, image files, and tables that list images.
        output: CSV or Parquet file to write.
        top: Number of classes for each image.
        strict: Whether files that cannot be read are a failure, after the table has been written.
        overwrite: Whether to replace ``output``.
        which: Checkpoint of a run folder.
        batch_size: Number of images of a batch.
        workers: Number of processes that decode images; None chooses it.
        device: Device that predicts; ``auto`` is a GPU where there is one and the file can use it.

    Raises:
        ACKDError: If the network, the images or the output are not usable.
        UnreadableImagesError: With ``strict``, if files were skipped.
    """
    target = Path(output)
    _check_numbers(top=top, batch_size=batch_size, workers=workers)
    check_ending(target)
    listed = list_images(images)
    check_predictions(target, overwrite=overwrite)
    network = open_any(run, which=which, device=chosen_device(device))
    if device == "cuda" and network.network is None:
        raise ACKDError(f"--device is cuda and {network.path} is a graph, which runs on the CPU; leave --device out")
    place = chosen_device(device) if network.network is not None else torch.device("cpu")
    description = network.description
    if top > description.num_classes:
        raise ACKDError(f"--top is {top} and the network has {description.num_classes} classes; make it smaller")
    preprocessing, notes = Preprocessing(description), Notes()
    columns = (TextColumn("predicting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("predicting", total=len(listed))
        with torch.inference_mode():
            found = predict_images(
                network.logits,
                listed,
                preprocessing,
                notes,
                top=top,
                batch_size=batch_size,
                workers=workers,
                device=place,
                progress=lambda count: bar.advance(task, count),
            )
    write_table(found.columns(description.class_names), target)
    for name, problem in notes.unreadable:
        print(f"skipped {name}: {problem}", file=sys.stderr)
    for line in notes.lines(description.channels):
        print(line)
    if description.crop_pct is None:
        print(
            f"{network.path} does not state how images were resized in its training: they are resized until they cover "
            "the input (bilinear) and cut in the middle"
        )
    if description.class_names is None:
        print(f"{network.path} does not name its classes, so class_name is empty")
    if len(found.files) <= _SHOWN:
        names = description.names
        for file, numbers, shares in zip(
            found.files, found.classes.tolist(), found.probabilities.tolist(), strict=True
        ):
            print(f"{file}: {', '.join(f'{names[n]} {share:.1%}' for n, share in zip(numbers, shares, strict=True))}")
    skipped = f", {len(notes.unreadable):,} skipped" if notes.unreadable else ""
    print(f"predictions: {target} ({count_of(len(found.files), 'image')}{skipped})", flush=True)
    if strict and notes.unreadable:
        count = len(notes.unreadable)
        raise UnreadableImagesError(
            f"{count:,} of {len(listed):,} images could not be read (--strict); repair or remove them"
        )


def _check_numbers(*, top: int, batch_size: int, workers: int | None) -> None:
    for name, value, least in (("--top", top, 1), ("--batch-size", batch_size, 1), ("--workers", workers, 0)):
        if value is not None and value < least:
            raise ACKDError(f"{name} is {value}; it must be {least} or more")
