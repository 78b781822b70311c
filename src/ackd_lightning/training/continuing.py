"""What a fit that goes on from a checkpoint takes from the settings, and what from the checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from ackd_lightning.errors import ACKDError
from ackd_lightning.training.schedule import WarmUp, inner_schedule

_POSITION = {"last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i", "mode_worse"}
"""State of schedules that says where they are. Private entries belong to it; all others are settings."""


def schedule_settings(scheduler: LRScheduler) -> dict[str, Any]:
    """Return the settings in the state of a schedule: everything but its position.

    Args:
        scheduler: Schedule, perhaps with a warm-up around it.
    """
    inner = inner_schedule(scheduler)
    state = inner.state_dict().items()
    public = {key: each for key, each in state if key not in _POSITION and not key.startswith("_")}
    return copy.deepcopy(public)


def take_settings(scheduler: LRScheduler, settings: Mapping[str, Any]) -> list[str]:
    """Give a restored schedule the settings that it was built with; its position stays that of the checkpoint.

    The learning rate becomes that of the new schedule at this position where it has a formula for it.

    Args:
        scheduler: Schedule after its state was restored.
        settings: What `schedule_settings` returned when it was built.

    Returns:
        Settings that changed, as ``name before -> after``.
    """
    inner = inner_schedule(scheduler)
    before = schedule_settings(inner)
    changed = {key: each for key, each in settings.items() if key in before and before[key] != each}
    foreign = before.keys() - settings.keys()  # of a schedule of another class
    if not changed and not foreign:
        return []
    for key in foreign:
        delattr(inner, key)
    for key, value in changed.items():
        setattr(inner, key, copy.deepcopy(value))
    if isinstance(inner, OneCycleLR):
        # its phases are made by the constructor, from the length
        share = changed["total_steps"] / before["total_steps"] if "total_steps" in changed else 1.0
        for phase in inner._schedule_phases:
            phase["end_step"] = (phase["end_step"] + 1) * share - 1
    groups = inner.optimizer.param_groups
    if callable(formula := getattr(inner, "_get_closed_form_lr", None)):
        rates = [float(each) for each in formula()]
    elif isinstance(inner, (OneCycleLR, LambdaLR)):
        inner.last_epoch -= 1
        inner.step()
        rates = [float(group["lr"]) for group in groups]
    else:
        rates = [float(group["lr"]) for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    inner._last_lr = list(rates)
    if isinstance(scheduler, WarmUp):
        scheduler.unscaled = list(rates)
        scheduler._scale()
    if foreign:
        return [f"it is now {type(inner).__name__}"]
    return [f"{key} {_shown(before[key])} -> {_shown(each)}" for key, each in changed.items()]


def _shown(value: Any) -> Any:
    return sorted(value) if isinstance(value, Mapping) else value


def describe_schedules(schedules: Sequence[LRSchedulerConfig]) -> list[tuple[str, bool]]:
    """Return interval and warm-up of the schedules of a fit as plain data for a checkpoint.

    Args:
        schedules: Lightning's schedules.
    """
    return [(each.interval, isinstance(each.scheduler, WarmUp)) for each in schedules]


def compare_schedules(before: Sequence[tuple[str, bool]], schedules: Sequence[LRSchedulerConfig]) -> None:
    """Refuse schedules that would take their position in a checkpoint for another one.

    Args:
        before: What `describe_schedules` returned when the checkpoint was written.
        schedules: Schedules of the fit that goes on.

    Raises:
        ACKDError: If a schedule counts something else, or has a warm-up in one of them alone.
    """
    for (interval, warmed), (now, warms) in zip(before, describe_schedules(schedules), strict=False):
        remedy = "leave it as it was, or start a new run from the weights with student.weights"
        if interval != now:
            raise ACKDError(f"the checkpoint's schedule counts each {interval} and recipe.interval is {now}; {remedy}")
        if warmed != warms:
            has, names = ("a", "none") if warmed else ("no", "one")
            raise ACKDError(
                f"the checkpoint's schedule has {has} warm-up and recipe.warmup_epochs asks for {names}; {remedy}"
            )


def describe_optimizers(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """Return class, arguments and parameter groups of optimizers as plain data for a checkpoint.

    Args:
        optimizers: Optimizers of a fit.
    """
    return [
        {
            "class": type(each).__name__,
            "lr": float(each.defaults.get("lr", 0.0)),
            "groups": [len(group["params"]) for group in each.param_groups],
            "arguments": {
                name: value
                for name, value in each.defaults.items()
                if name != "lr" and isinstance(value, bool | int | float | str | tuple | None)
            },
            "rates": [float(group["initial_lr"]) for group in each.param_groups if "initial_lr" in group],
        }
        for each in optimizers
    ]


def compare_optimizers(before: Sequence[Mapping[str, Any]], optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that cannot take the state in a checkpoint, and say that its learning rates are kept.

    Args:
        before: What `describe_optimizers` returned when the checkpoint was written.
        optimizers: Optimizers of the fit that goes on.

    Raises:
        ACKDError: If classes or parameter groups differ.
    """
    now = describe_optimizers(optimizers)
    first, second = (" and ".join(str(each["class"]) for each in found) for found in (before, now))
    if first != second:
        raise ACKDError(
            f"the checkpoint was trained with {first} and the settings name {second}, which cannot go on from its "
            "state; give that optimizer, or start a new run from its weights with student.weights"
        )
    for old, new, optimizer in zip(before, now, optimizers, strict=True):
        if list(old["groups"]) != new["groups"]:
            raise ACKDError(
                f"the checkpoint's {old['class']} has {len(old['groups'])} parameter groups of {list(old['groups'])} "
                f"tensors and the settings make {len(new['groups'])} of {new['groups']}; leave student.freeze, "
                "student.backbone_lr_scale and recipe.decay_norm_and_bias as they were"
            )
        if (rate := old.get("lr", new["lr"])) != new["lr"]:
            optimizer.defaults["lr"] = rate
            rank_zero_warn(
                f"{new['class']} goes on with the learning rate of its checkpoint, {rate:g}, and not with "
                f"{new['lr']:g}; for another rate, start a new fit from the weights"
            )
        others = [
            f"{name} {value} and not {new['arguments'][name]}"
            for name, value in old.get("arguments", {}).items()
            if name in new["arguments"] and value != new["arguments"][name]
        ]
        then, present = (_shares(each.get("rates", [])) for each in (old, new))
        if len(then) == len(present) and not np.allclose(then, present):
            others.append("its own factors of the learning rate and not student.backbone_lr_scale of this fit")
        if others:
            rank_zero_warn(
                f"{new['class']} goes on with what its checkpoint has: {', '.join(others)}; for other values, start a "
                "new fit from the weights"
            )


def _shares(rates: Sequence[float]) -> list[float]:
    """Rates of parameter groups as shares of the largest."""
    return [each / max(rates) if max(rates) else 0.0 for each in rates] if rates else []


def refuse_inside_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to go on inside an epoch whose loader has no position, as that of ``overfit_batches``.

    Args:
        checkpoint: Content of a checkpoint.

    Raises:
        ACKDError: If it was written before the end of an epoch.
    """
    progress = ((checkpoint.get("loops") or {}).get("fit_loop") or {}).get("epoch_loop.batch_progress") or {}
    if progress.get("current", {}).get("ready") and not progress.get("is_last_batch"):
        raise ACKDError(
            "the checkpoint was written inside an epoch, and with trainer.overfit_batches the epoch would start again; "
            "start a new run"
        )


def go_on_inside_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a fit that ended inside an epoch, by its steps or its time, go on with the rest of that epoch.

    Lightning counts the epoch as processed then, and would read its rest in the order of the next one.

    Args:
        checkpoint: Content of a checkpoint; changed in place.
    """
    loop = (checkpoint.get("loops") or {}).get("fit_loop") or {}
    loaders = (loop.get("state_dict") or {}).get("combined_loader") or []
    progress = loop.get("epoch_progress") or {}
    if len(loaders) != 1 or not isinstance(loaders[0], dict) or not loaders[0].get("batches"):
        return
    if (loop.get("epoch_loop.batch_progress") or {}).get("is_last_batch"):
        return  # trainer.limit_train_batches ended the epoch
    for counts in progress.values():
        if progress["current"]["completed"] == loaders[0].get("epoch") and counts["processed"] > counts["completed"]:
            counts["processed"] = counts["completed"]
