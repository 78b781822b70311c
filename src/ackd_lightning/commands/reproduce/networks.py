"""Sizes of a run's networks, for estimates; the networks themselves are not kept, because a plan may have hundreds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ackd_lightning.training.module import DistillationModule

_SAMPLE = 64
"""Number of images with which the size of a method's memory is measured."""


@dataclass(frozen=True)
class Networks:
    """What an estimate needs to know of the networks of a run.

    Attributes:
        student: Name of the student, including its auxiliary learners.
        teacher: Name of the teacher; None for a method without one.
        input_size: Side of the images in pixels.
        num_classes: Number of classes K.
        trained: Number of trained parameters.
        kept: Number of parameters of the plain student.
        bytes_per_image: Bytes that the method stores per training image.
    """

    student: str
    teacher: str | None
    input_size: int
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
        method, names = module.method, module.hparams

        def size() -> int:
            return sum(each.nbytes for each in method.state_dict().values())

        trained = sum(each.numel() for each in (*module.student.parameters(), *method.parameters()))
        before = size()
        if method.needs_targets:
            method.set_targets(torch.arange(_SAMPLE) % module.num_classes)
        return cls(
            student=f"{names['student']} {module.student.specs}",
            teacher=str(names["teacher"]) if method.needs_teacher else None,
            input_size=module.input_size,
            num_classes=module.num_classes,
            trained=trained,
            kept=sum(each.numel() for each in module.student.plain().parameters()),
            bytes_per_image=(size() - before) / _SAMPLE,
        )
