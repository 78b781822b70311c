"""Sizes of a run's networks, for estimates; the networks themselves are not kept, because a plan may have hundreds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ackd_lightning.methods.base import FitInfo
from ackd_lightning.training.module import DistillationModule

_SAMPLE = 64
"""Number of images with which the size of a method's memory is measured."""


@dataclass(frozen=True)
class Networks:
    """What an estimate needs to know of the networks of a run.

    Attributes:
        student: Name of the student, including its auxiliary learners.
        teachers: Name and keyword arguments of every teacher.
        image_shape: ``(C, H, W)`` of an image.
        num_classes: Number of classes K.
        trained: Number of trained parameters.
        kept: Number of parameters of the plain student.
        bytes_per_image: Bytes that the method stores per training image.
    """

    student: str
    teachers: tuple[tuple[str, dict[str, Any]], ...]
    image_shape: tuple[int, int, int]
    num_classes: int
    trained: int
    kept: int
    bytes_per_image: float

    @classmethod
    def of(cls, module: DistillationModule) -> Networks:
        """Measure the networks of a module; its method is given a small memory meanwhile.

        Args:
            module: Module as planned.
        """
        method, data = module.method, module.data

        def size() -> int:
            return sum(each.nbytes for each in method.state_dict().values())

        trained = sum(each.numel() for each in (*module.student.parameters(), *method.parameters()))
        before = size()
        if method.teacher != "own":  # such a method needs loaded teachers
            targets = torch.arange(_SAMPLE) % data.num_classes
            method.begin_fit(FitInfo(epochs=None, batch_size=None, targets=targets, seed=0, teachers=()))
        return cls(
            student=f"{module.model_name} {module.student.specs}",
            teachers=tuple((str(each.network), dict(each.options or {})) for each in module.teachers.configs),
            image_shape=data.image_shape,
            num_classes=data.num_classes,
            trained=trained,
            kept=sum(each.numel() for each in module.student.plain().parameters()),
            bytes_per_image=(size() - before) / _SAMPLE,
        )
