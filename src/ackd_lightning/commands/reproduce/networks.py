"""Sizes of a run's networks, for estimates; the networks themselves are not kept, because a plan may have hundreds."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch

from ackd_lightning.methods.base import FitInfo
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.training.students import build_student
from ackd_lightning.types import DataInfo

_PROVED: set[tuple[str, str]] = set()
"""Students with branches that were built with weights."""
_SAMPLE = 64
"""Number of images with which the size of a method's memory is measured."""


@dataclass(frozen=True)
class Networks:
    """What an estimate needs to know of the networks of a run.

    Attributes:
        student: Name of the student, including its auxiliary learners.
        teachers: Name and keyword arguments of every teacher.
        student_config: What the student is built from.
        branches: Auxiliary learners of the student.
        data: Classes and images.
        trained: Number of trained parameters.
        kept: Number of parameters of the plain student.
        bytes_per_image: Bytes that the method stores per training image.
    """

    student: str
    teachers: tuple[tuple[str, dict[str, Any]], ...]
    student_config: StudentConfig
    branches: tuple[str, ...]
    data: DataInfo
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
            student_config=module.student_config,
            branches=module.student.specs,
            data=data,
            trained=trained,
            kept=sum(each.numel() for each in module.student.plain().parameters()),
            bytes_per_image=(size() - before) / _SAMPLE,
        )


def prove(module: DistillationModule) -> None:
    """Build a student with branches once with weights, by which the branches are shown to be parts of the network.

    Args:
        module: Module whose networks may have shapes alone.

    Raises:
        ACKDError: If a branch does not compute what the network computes.
    """
    branches, key = module.student.specs, (repr(module.student_config), f"{module.student.specs} {module.data}")
    if branches and key not in _PROVED:
        build_student(module.student_config, branches, module.data)
        gc.collect()  # a network whose stages are watched is part of a circle
        _PROVED.add(key)
