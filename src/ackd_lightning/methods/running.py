"""What methods share that run their teachers themselves (``teacher = "own"``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.teacher import FrozenTeacher

T = TypeVar("T")


def only_teacher(teachers: Sequence[T], method: str) -> T:
    """Return the teacher of a method that runs one.

    Args:
        teachers: Teachers of the training, or their shapes.
        method: Name of the method, for the message.

    Raises:
        ACKDError: If there are several.
    """
    if len(teachers) != 1:
        raise ACKDError(f"method {method} has one teacher and `teacher` names {len(teachers)}; name one of them")
    return teachers[0]


def require_logits(teacher: FrozenTeacher, method: str) -> FrozenTeacher:
    """Return a teacher whose logits are those of the data's classes.

    Args:
        teacher: Teacher that the method runs.
        method: Name of the method, for the message.

    Raises:
        ACKDError: If the features of the teacher alone are used.
    """
    if teacher.features_only:
        raise ACKDError(
            f"class_map of teacher {teacher.name} is features and method {method} reads logits; map the teacher's "
            "classes"
        )
    return teacher
