"""Optimizers, learning rate schedules and warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from ackd_lightning.errors import ACKDError
from ackd_lightning.validation import NonNegative, NonNegativeInt, Positive, PositiveInt, Range, check_arguments

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
_LENGTHS = {"CosineAnnealingLR": "T_max", "PolynomialLR": "total_iters"}
"""Attributes that hold the length of a schedule; 0 stands for the length of the fit."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training recipe says besides optimizer and schedule.

    Attributes:
        interval: Step the learning rate schedule after every ``epoch`` or after every ``step``.
        warmup_epochs: Epochs over which the learning rate grows linearly to that of the schedule; 0 for none.
        gradient_clip_val: Largest norm of the gradient; None for no clipping. (The Trainer's own argument works in
            automatic optimization only.)
        decay_norm_and_bias: Apply weight decay to parameters with fewer than two dimensions (norms and biases), too.
        label_smoothing: Share of the label that all classes divide equally in every cross-entropy with the labels, from
            0 to below 1. Distillation terms have no labels and do not change.
        class_weights: Weight of each class in every cross-entropy with the labels, in the order of the class names.
            ``auto`` for weights inversely proportional to the number of training images, whose mean over the images is
            1; None for equal weights.
        ema_decay: Decay of an exponential moving average of the weights, which is validated, saved and exported in
            place of the weights. After n steps it is at most (1 + n) / (10 + n), so that short runs work. None for no
            average.
        early_stopping: Number of validations without a better ``val/acc`` after which the fit ends; None trains all
            epochs.
    """

    interval: Literal["epoch", "step"] = "epoch"
    warmup_epochs: NonNegativeInt = 0
    gradient_clip_val: Positive | None = None
    decay_norm_and_bias: bool = True
    label_smoothing: Annotated[float, Range(0, 1, open_high=True)] = 0.0
    class_weights: Literal["auto"] | list[NonNegative] | None = None
    ema_decay: Annotated[float, Range(0, 1, open_high=True)] | None = None
    early_stopping: PositiveInt | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_arguments(type(self), {each.name: getattr(self, each.name) for each in fields(self)})


class WarmUp(LRScheduler):
    """Multiply the learning rates of any schedule by a factor that grows linearly to 1.

    The factor is 1 / (n + 1) at the start of a warm-up of n steps of the schedule, and 1 after it.

    Args:
        scheduler: Schedule, which is stepped by this one.
        steps: Length n of the warm-up in steps of the schedule, at least 1.
    """

    def __init__(self, scheduler: LRScheduler, steps: int) -> None:
        self.optimizer = scheduler.optimizer
        self.scheduler, self.steps, self.count = scheduler, steps, 0
        self.unscaled = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._scale()

    def _take_new_groups(self) -> None:
        """Take over groups that were added to the optimizer, as Lightning's ``BaseFinetuning`` does."""
        self.unscaled += [float(group["lr"]) for group in self.optimizer.param_groups[len(self.unscaled) :]]

    def _scale(self) -> None:
        self._take_new_groups()
        factor = min(1.0, (self.count + 1) / (self.steps + 1))
        for group, lr in zip(self.optimizer.param_groups, self.unscaled, strict=True):
            group["lr"] = lr * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, metrics: Any = None) -> None:
        """Step the schedule and the warm-up.

        Args:
            metrics: Value that a schedule on a plateau reads.
        """
        self._take_new_groups()
        for group, lr in zip(self.optimizer.param_groups, self.unscaled, strict=True):
            group["lr"] = lr
        step_scheduler(self.scheduler, metrics)
        self.unscaled = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.count += 1
        self._scale()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of schedule and warm-up."""
        return {"scheduler": self.scheduler.state_dict(), "count": self.count, "unscaled": list(self.unscaled)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state_dict: State of schedule and warm-up.
        """
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self.count, self.unscaled = state_dict["count"], list(state_dict["unscaled"])
        self._scale()


def step_scheduler(scheduler: LRScheduler, metric: Any = None) -> None:
    """Step a schedule, with a metric where it reads one.

    Args:
        scheduler: Schedule.
        metric: Value of the monitored metric.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        if metric is not None:
            scheduler.step(metric)
    elif isinstance(scheduler, WarmUp):
        scheduler.step(metric)
    else:
        scheduler.step()


def inner_schedule(scheduler: Any) -> Any:
    """Return the schedule inside a warm-up, or a schedule without one.

    Args:
        scheduler: Schedule, perhaps with a warm-up around it.
    """
    return scheduler.scheduler if isinstance(scheduler, WarmUp) else scheduler


def parameters_of(*optimizers: Any) -> list[Parameter]:
    """Return all parameters of optimizers.

    Args:
        optimizers: Optimizers.
    """
    return [each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]]


def reads_metric(scheduler: LRScheduler) -> bool:
    """Return whether a schedule reads a metric.

    Args:
        scheduler: Schedule, perhaps with a warm-up around it.
    """
    return isinstance(inner_schedule(scheduler), ReduceLROnPlateau)


def build_scheduler(
    factory: SchedulerFactory,
    optimizer: Optimizer,
    recipe: Recipe,
    *,
    steps_per_epoch: float,
    length: float,
    own_rate: bool = False,
) -> LRScheduler:
    """Build a schedule with its warm-up.

    Args:
        factory: Builds the schedule of an optimizer.
        optimizer: Optimizer whose learning rates follow.
        recipe: Interval and warm-up.
        steps_per_epoch: Steps of the schedule in an epoch: 1, or the optimizer's with ``interval="step"``; infinite
            when unknown.
        length: Steps of the schedule in the whole fit; infinite when unknown.
        own_rate: Keep the optimizer's learning rate as the largest one of a schedule that has its own (``OneCycleLR``,
            ``CyclicLR``). Otherwise the first group follows the schedule, and the others keep their ratio to it.

    Raises:
        ACKDError: If the length of the schedule or of its warm-up is not known.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    scheduler = factory(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise ACKDError(
            f"lr_scheduler makes a {type(scheduler).__name__}, which is not a schedule of torch.optim.lr_scheduler; "
            "choose one of those, such as CosineAnnealingLR, with recipe.warmup_epochs for a warm-up"
        )
    lowest = min((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
    period = getattr(scheduler, "T_max", 0)
    if lowest < 0 or period < 0:
        raise ACKDError(
            f"{type(scheduler).__name__} starts with learning rate {lowest:g} and T_max {period}; use 0 or more"
        )
    _keep_ratios(scheduler, rates, own_rate=own_rate)
    name = _LENGTHS.get(type(scheduler).__name__)
    if name is not None and getattr(scheduler, name) == 0:
        if length < 1 or math.isinf(length):
            raise ACKDError(
                f"{name} of {type(scheduler).__name__} is 0, the length of the fit, which is unknown; set {name}, or "
                f"trainer.{'max_steps' if recipe.interval == 'step' else 'max_epochs'}"
            )
        setattr(scheduler, name, int(length))
    if not recipe.warmup_epochs:
        return scheduler
    if math.isinf(steps_per_epoch):
        raise ACKDError(
            f"recipe.warmup_epochs is {recipe.warmup_epochs} and the number of batches in an epoch is unknown; set "
            "warmup_epochs to 0, or trainer.limit_train_batches"
        )
    return WarmUp(scheduler, recipe.warmup_epochs * max(1, math.ceil(steps_per_epoch)))


def largest_rate(optimizer: Optimizer, schedulers: Sequence[Any] = ()) -> float:
    """Return the largest learning rate that the first parameter group reaches.

    Args:
        optimizer: Optimizer.
        schedulers: Its schedules, perhaps with a warm-up around them.
    """
    group = optimizer.param_groups[0]
    inner = list(map(inner_schedule, schedulers))
    cyclic = [float(each.max_lrs[0]) for each in inner if isinstance(each, CyclicLR)]
    unscaled = [each.unscaled[0] for each in schedulers if isinstance(each, WarmUp)]
    present = max(unscaled, default=group["lr"])
    return max(cyclic) if cyclic else float(group.get("max_lr", group.get("initial_lr", present)))


def follow_student(
    optimizer: Optimizer, student: Optimizer, schedulers: Sequence[Any] = (), *, same_kind: bool
) -> float | None:
    """Train the groups of a method's optimizer that have an ``lr_scale`` at this multiple of the student's rate.

    Rates of unlike optimizers cannot be compared: then the groups keep the rate that the method gave them. So do groups
    whose rate was changed since.

    Args:
        optimizer: Optimizer of the method, perhaps with a schedule.
        student: The student's optimizer.
        schedulers: Schedules of both, perhaps with a warm-up around them.
        same_kind: Whether the rates of the two can be compared.

    Returns:
        Learning rate of the first of these groups; None if there is none, or its rate was changed.
    """
    found: float | None = None
    for group in optimizer.param_groups:
        scale, own = group.pop("lr_scale", None), float(group.get("initial_lr", group["lr"]))
        if scale is None or own != optimizer.defaults["lr"]:
            continue
        rate = largest_rate(student, [each for each in schedulers if each.optimizer is student]) * scale
        if same_kind and rate != own:
            _multiply(group, rate / own)
            for each in schedulers:
                if each.optimizer is optimizer and hasattr(each, "base_lrs"):
                    each.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        found = (rate if same_kind else own) if found is None else found
    return found


def _multiply(group: dict[str, Any], factor: float) -> None:
    """Multiply all learning rates that a parameter group knows."""
    for key in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():
        group[key] = group[key] * factor


def _keep_ratios(scheduler: LRScheduler, rates: Sequence[float], *, own_rate: bool) -> None:
    """Scale the learning rates of a schedule that sets the same for all groups, whatever their own are."""
    groups = scheduler.optimizer.param_groups
    if isinstance(scheduler, OneCycleLR):
        largest = [float(group["max_lr"]) for group in groups]
    elif isinstance(scheduler, CyclicLR):
        largest = [float(each) for each in scheduler.max_lrs]
    else:
        return
    factors = [rate / (top if own_rate else rates[0]) for rate, top in zip(rates, largest, strict=True)]
    for group, factor in zip(groups, factors, strict=True):
        _multiply(group, factor)
    if isinstance(scheduler, CyclicLR):
        for name in ("base_lrs", "max_lrs"):
            values = zip(getattr(scheduler, name), factors, strict=True)
            setattr(scheduler, name, [value * factor for value, factor in values])


def without_decay(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split parameter groups so that norms and biases have no weight decay.

    Args:
        groups: Parameter groups with ``params`` and ``name``.
    """
    result: list[dict[str, Any]] = []
    for group in groups:
        flat = [each for each in group["params"] if each.ndim < 2]
        other = [each for each in group["params"] if each.ndim >= 2]
        if other:
            result.append({**group, "params": other})
        if flat:
            result.append({**group, "params": flat, "name": f"{group['name']}_no_decay", "weight_decay": 0.0})
    return result


def scale_learning_rates(optimizer: Optimizer, scales: Mapping[int, float]) -> None:
    """Multiply the learning rate of parameter groups.

    Args:
        optimizer: Optimizer without a schedule yet.
        scales: Factor by the ``id`` of a group's first parameter.
    """
    for group in optimizer.param_groups:
        factor = scales.get(id(group["params"][0]), 1.0) if group["params"] else 1.0
        if factor != 1.0:
            group["lr"] = group["lr"] * factor
