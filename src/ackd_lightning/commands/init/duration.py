"""Rough duration of the two trainings that ``ackd init`` proposes."""

from __future__ import annotations

import functools
import time

import torch

from ackd_lightning.commands.init.choices import Choices
from ackd_lightning.commands.init.survey import Survey
from ackd_lightning.commands.stopwatch import OVERHEAD, Stopwatch
from ackd_lightning.data.datasets import FileImages
from ackd_lightning.data.pixels import ImageFormat
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.training.students import build_student
from ackd_lightning.types import DataInfo

_READ = 12
"""Images whose reading is timed."""
_BATCH = {"cuda": 128, "cpu": 32}
"""Largest batch that networks are timed with."""
_EPOCH = 0.5
"""Seconds of an epoch that do not depend on the images: processes that start to read, checkpoint, lines."""


def durations(seen: Survey, chosen: Choices) -> tuple[float, float]:
    """Time a few passes of both networks and the reading of a few images.

    Args:
        seen: What the folder holds.
        chosen: Values of both configurations.

    Returns:
        Rough durations of the teacher's and of the student's training on this machine, in seconds.

    Raises:
        ACKDError: If an image cannot be read as training reads it.
    """
    data = DataInfo(len(seen.class_names), input_size=chosen.image_size, channels=chosen.channels)
    batch = min(_BATCH[chosen.device], chosen.batch_size)
    watch = Stopwatch(batch, device=chosen.device, channels_last=not chosen.small)

    def seconds(name: str, *, train: bool) -> float:
        make = functools.partial(build_student, StudentConfig(network=name), (), data)
        return watch.seconds(lambda: make()[0], name, data.image_shape, train=train)

    read = _read_seconds(seen, chosen)
    validated = len(seen.parts["val" if chosen.val_fraction is None else "test"].targets)
    if chosen.val_fraction:
        validated = sum(seen.counts) - chosen.trained

    def total(trained: float, validation: float, epochs: int) -> float:
        network = OVERHEAD * trained * chosen.trained + validation * validated
        reading = read * (chosen.trained + validated)
        # on a CPU the processes that read images share the processors with the training
        each = max(network, reading) if chosen.device == "cuda" else network + reading
        return (each + _EPOCH) * epochs

    evaluated = {name: seconds(name, train=False) for name in (chosen.teacher, chosen.student)}
    student = seconds(chosen.student, train=True) + evaluated[chosen.teacher]
    return (
        total(seconds(chosen.teacher, train=True), evaluated[chosen.teacher], chosen.teacher_epochs),
        total(student, evaluated[chosen.student], chosen.student_epochs),
    )


def _read_seconds(seen: Survey, chosen: Choices) -> float:
    """Seconds for each image that reading takes with all processes; 0 for small ones, which are kept decoded."""
    if chosen.small:
        return 0.0
    paths = [path for each in seen.readable for path in each]
    deep = any(each.depth.deep for each in seen.good)
    size = (chosen.image_size, chosen.image_size)
    form = ImageFormat(size, chosen.channels, chosen.value_range, deep=deep)
    rows = torch.linspace(0, len(paths) - 1, _READ + 1).long()
    images = FileImages(lambda row: paths[row], torch.zeros(len(paths), dtype=torch.long), rows, form=form, seed=0)
    images[0, 0]  # the first one imports decoders
    begin = time.perf_counter()
    for row in range(1, len(rows)):
        images[0, row]
    return (time.perf_counter() - begin) / _READ / max(1, chosen.num_workers)
