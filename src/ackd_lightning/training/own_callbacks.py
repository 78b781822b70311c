"""Callbacks that a training module brings into any Trainer."""

from __future__ import annotations

import lightning.pytorch as L

from ackd_lightning.callbacks.averaging import EMA
from ackd_lightning.callbacks.health import HealthMonitor, TeacherGate
from ackd_lightning.callbacks.stopping import StopEarly
from ackd_lightning.methods.base import Method
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.training.schedule import Recipe


def own_callbacks(
    trainer: L.Trainer, method: Method, recipe: Recipe, teachers: tuple[TeacherConfig, ...], *, branches: bool
) -> list[L.Callback]:
    """Return alarms, the teacher gate, callbacks of the recipe and pictures of the method.

    Args:
        trainer: Trainer of the fit; what it already has is not added again.
        method: Method, which may have example images.
        recipe: Average of the weights and early stopping.
        teachers: Settings of the teachers.
        branches: Whether the student has auxiliary learners.
    """
    present: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    watched = any(isinstance(each, HealthMonitor) for each in present)
    callbacks: list[L.Callback] = [HealthMonitor()] if branches and not watched else []
    if recipe.ema_decay is not None:
        callbacks.append(EMA(decay=recipe.ema_decay))
    if recipe.early_stopping is not None:
        callbacks.append(StopEarly(recipe.early_stopping))
    if any(each.gate != "off" for each in teachers):
        callbacks.append(TeacherGate())
    if hasattr(method, "examples"):
        from ackd_lightning.callbacks.examples import ExamplePictures  # matplotlib is slow to import

        asked = any(isinstance(each, ExamplePictures) for each in present)
        callbacks += [ExamplePictures()] if trainer.loggers and not asked else []  # else: no folder of a run
    return callbacks
