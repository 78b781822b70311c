"""What a callback may ask of a training module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ackd_lightning.methods.base import Method
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.types import Batch, DataInfo, NetOutput, NetSpec


class _Teachers(Protocol):
    @property
    def configs(self) -> Sequence[TeacherConfig]: ...
    @property
    def frozen(self) -> tuple[FrozenTeacher, ...]: ...
    def key(self) -> list[dict[str, Any]]: ...
    def __call__(self, image: Tensor) -> NetOutput: ...


class _Means(Protocol):
    def compute(self) -> dict[str, Tensor]: ...


class _Guard(Protocol):
    skipped: int


class TrainingModule(Protocol):
    """A `DistillationModule`, as far as callbacks know it; they stand below the training modules."""

    student: BranchyStudent
    method: Method
    spec: NetSpec
    data: DataInfo
    seed: int
    student_config: StudentConfig

    @property
    def teachers(self) -> _Teachers:
        """The teachers."""

    @property
    def means(self) -> _Means:
        """Means of what a training step logs."""

    @property
    def guard(self) -> _Guard:
        """Counts skipped steps."""

    @property
    def device(self) -> torch.device:
        """Where the module is."""

    @property
    def model_name(self) -> str | None:
        """Name of the student for ``create_model``; None for a network that it does not build."""

    @property
    def teacher_spec(self) -> NetSpec | None:
        """Shapes of the first teacher."""

    def as_batch(self, batch: Any, *, first: bool = False) -> Batch:
        """Read a batch of any data module."""

    def kept_network(self) -> nn.Module:
        """The network that is left after training."""

    def training_parameters(self) -> int:
        """Number of parameters that learn."""

    def looks_at_test(self) -> bool:
        """Whether validation reads the test set."""
