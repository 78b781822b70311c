"""Knowledge distillation for PyTorch Lightning, built around ACKD."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ackd_lightning._version import __version__

if TYPE_CHECKING:
    from ackd_lightning.data import (
        CIFAR100DataModule,
        CINIC10DataModule,
        DigitsDataModule,
        HuggingFaceDataModule,
        ImageDataModule,
        ImageFolderDataModule,
        ImageNetDataModule,
        TableDataModule,
        TinyImageNetDataModule,
        WebDatasetDataModule,
    )
    from ackd_lightning.deploy.student import load_student
    from ackd_lightning.errors import ACKDError
    from ackd_lightning.methods import ACKD, CE, KD, FitInfo, Method, Networks, Sum
    from ackd_lightning.models.features import StagePlan
    from ackd_lightning.models.student import BranchyStudent
    from ackd_lightning.models.student_config import StudentConfig
    from ackd_lightning.models.teacher import FrozenTeacher
    from ackd_lightning.models.teacher_config import TeacherConfig
    from ackd_lightning.models.weights import load_weights, save_weights
    from ackd_lightning.models.zoo import create_model
    from ackd_lightning.training import ACKDModule, DistillationModule, Recipe
    from ackd_lightning.types import Batch, DataInfo, NetOutput, NetSpec

_HOMES = {
    "data": (
        "CIFAR100DataModule",
        "CINIC10DataModule",
        "DigitsDataModule",
        "HuggingFaceDataModule",
        "ImageDataModule",
        "ImageFolderDataModule",
        "ImageNetDataModule",
        "TableDataModule",
        "TinyImageNetDataModule",
        "WebDatasetDataModule",
    ),
    "deploy.student": ("load_student",),
    "errors": ("ACKDError",),
    "methods": ("ACKD", "CE", "KD", "FitInfo", "Method", "Networks", "Sum"),
    "models.student": ("BranchyStudent",),
    "models.features": ("StagePlan",),
    "models.student_config": ("StudentConfig",),
    "models.teacher": ("FrozenTeacher",),
    "models.teacher_config": ("TeacherConfig",),
    "models.weights": ("load_weights", "save_weights"),
    "models.zoo": ("create_model",),
    "training": ("ACKDModule", "DistillationModule", "Recipe"),
    "types": ("Batch", "DataInfo", "NetOutput", "NetSpec"),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ACKD",
    "CE",
    "KD",
    "ACKDError",
    "ACKDModule",
    "Batch",
    "BranchyStudent",
    "CIFAR100DataModule",
    "CINIC10DataModule",
    "DataInfo",
    "DigitsDataModule",
    "DistillationModule",
    "FitInfo",
    "FrozenTeacher",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "Method",
    "NetOutput",
    "NetSpec",
    "Networks",
    "Recipe",
    "StagePlan",
    "StudentConfig",
    "Sum",
    "TableDataModule",
    "TeacherConfig",
    "TinyImageNetDataModule",
    "WebDatasetDataModule",
    "__version__",
    "create_model",
    "load_student",
    "load_weights",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``ackd --help`` does not wait for torch."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"ackd_lightning.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'ackd_lightning' has no attribute {name!r}")
