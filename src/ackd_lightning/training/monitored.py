"""Metrics that callbacks monitor, compared with those that a run logs, before its first step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor

from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.methods.base import Method


def check_monitors(module: Any) -> None:
    """Refuse a callback that monitors a metric which the run does not log; Lightning notices after an epoch.

    Nothing is refused where a module, method or callback of the user's own may log it.

    Args:
        module: Training module that belongs to a Trainer.

    Raises:
        ACKDError: Naming the metric and those that are logged.
    """
    callbacks = module.trainer.callbacks
    parts = (module, module.method, *callbacks)
    if not all(type(each).__module__.startswith(("ackd_lightning.", "lightning.")) for each in parts):
        return
    known = _logged(module) | _rates(module, callbacks)
    for each in callbacks:
        monitor = getattr(each, "monitor", None)
        if not isinstance(monitor, str) or not getattr(each, "strict", True):
            continue
        plain = re.sub(r"^(val|test)\d+/", r"\1/", monitor)  # of a further loader
        split, _, name = plain.partition("/")
        measures = type(module.method).statistics is not Method.statistics and f"{split}/acc" in known
        open_ended = measures or (split == "train" and bool(module.auxiliary))  # names that a method makes up
        counted = split in ("epoch", "step") and isinstance(each, Checkpoint)
        if plain in known or counted or (open_ended and name):
            continue
        near = near_matches(monitor, known, otherwise="")
        raise ACKDError(
            f"{type(each).__name__} monitors {monitor!r} and this run logs no such metric; {near}"
            f"{' Known' if near else 'known'} are {', '.join(sorted(known))}"
        )


def _rates(module: Any, callbacks: Sequence[Any]) -> set[str]:
    """Learning rates, which are metrics where a callback logs them."""
    if not any(isinstance(each, LearningRateMonitor) for each in callbacks):
        return set()
    groups = (each["name"] for each in module.learner_groups())
    return {f"lr/{name}" for name in (*groups, *module.auxiliary)}


def _logged(module: Any) -> set[str]:
    """Metrics that are known before a run starts: terms of the loss and accuracies."""
    names = {"train/loss", "train/loss_step", "train/acc", *(f"train/{each}" for each in module.method.loss_weights)}
    if module.guard.on_nonfinite == "skip":
        names.add("train/skipped")
    if not module.trainer.enable_validation:
        return names
    split, evaluation = "test" if module.looks_at_test() else "val", module.evaluation
    names |= {f"{split}/loss", *(f"{split}/{each}" for each in evaluation.accuracies)}
    if evaluation.learner_statistics is not None:
        names |= {f"{split}/learners_{each}" for each in evaluation.learner_statistics.names}
    return names
