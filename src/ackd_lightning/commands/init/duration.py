"""Rough duration of the two trainings that ``ackd init`` proposes."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import torch

from ackd_lightning.commands.init.choices import Choices
from ackd_lightning.commands.stopwatch import OVERHEAD, Stopwatch
from ackd_lightning.data.folder import ImageFolderDataModule
from ackd_lightning.data.messages import said_before
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.training.students import build_student

_READ, _BATCH = 12, 32
"""Images whose reading is timed, and the largest batch that networks are timed with."""


def durations(chosen: Choices, arguments: dict[str, Any]) -> tuple[float, float]:
    """Time a few passes of both networks and the reading of a few images.

    Args:
        chosen: Values of both configurations.
        arguments: Arguments of the data module in them.

    Returns:
        Rough durations of the teacher's and of the student's training on this machine, in seconds.
    """
    data = ImageFolderDataModule(**arguments)
    watch = Stopwatch(min(_BATCH, chosen.batch_size), channels_last=not chosen.small)
    shape = data.info.image_shape

    def seconds(name: str, *, train: bool) -> float:
        make = functools.partial(build_student, StudentConfig(network=name), (), data.info)
        return watch.seconds(lambda: make()[0], name, shape, train=train)

    read = _read_seconds(data, chosen)
    teacher = seconds(chosen.teacher, train=True)
    student = seconds(chosen.student, train=True) + seconds(chosen.teacher, train=False)
    images = chosen.trained

    def total(network: float, epochs: int) -> float:
        # on a CPU the processes that read images share the processors with the training
        each = max(network * OVERHEAD, read) if watch.device.type == "cuda" else network * OVERHEAD + read
        return each * images * epochs

    return total(teacher, chosen.teacher_epochs), total(student, chosen.student_epochs)


def _read_seconds(data: ImageFolderDataModule, chosen: Choices) -> float:
    """Seconds for each image that reading and augmentation take with all processes; 0 for small ones, kept decoded."""
    if chosen.small:
        return 0.0
    with said_before():  # by the look at the folder
        data.setup()
        images: Any = data.train_dataloader().dataset
    rows = torch.linspace(0, len(images) - 1, _READ + 1).long().tolist()
    images[rows[0]]  # the first one imports decoders
    begin = time.perf_counter()
    for row in rows[1:]:
        images[row]
    return (time.perf_counter() - begin) / _READ / max(1, min(chosen.num_workers, os.cpu_count() or 1))
