"""Optimizers and schedules of a training module, its own and those of its method."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ackd_lightning.callbacks.length import epochs_of_fit, is_whole_epoch
from ackd_lightning.data.loaders import data_of
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.training.continuing import (
    compare_optimizers,
    compare_schedules,
    schedule_settings,
    take_settings,
)
from ackd_lightning.training.dot import DOT, TwoGradients
from ackd_lightning.training.factories import refused_arguments
from ackd_lightning.training.manual import metric_missing
from ackd_lightning.training.own_optimizers import with_method_optimizers
from ackd_lightning.training.schedule import (
    OptimizerFactory,
    Recipe,
    SchedulerFactory,
    build_scheduler,
    follow_student,
    parameters_of,
    reads_metric,
    scale_learning_rates,
    step_scheduler,
    without_decay,
)
from ackd_lightning.training.students import slow_parameters


class OpenOptimizers(TwoGradients):
    """A module whose optimizer and schedule are given, or returned by an overridden ``configure_optimizers``.

    Attributes:
        student: The student.
        student_config: How it is named and trained.
        recipe: Interval of the schedule, warm-up, clipping, weight decay.
        optimizer_factory: Builds the student's optimizer.
        scheduler_factory: Builds the schedule of an optimizer.
    """

    student: BranchyStudent
    student_config: StudentConfig
    recipe: Recipe
    optimizer_factory: OptimizerFactory
    scheduler_factory: SchedulerFactory

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._schedule_settings: dict[int, dict[str, Any]] = {}
        self._resumed_optimizers: list[dict[str, Any]] = []
        self._resumed_schedules: list[tuple[str, bool]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let an overridden ``configure_optimizers`` return the student's optimizer alone."""
        super().__init_subclass__(**kwargs)
        own = cls.configure_optimizers
        if own is not OpenOptimizers.configure_optimizers and not hasattr(own, "adds_method_optimizers"):
            cls.configure_optimizers = with_method_optimizers(own)  # type: ignore[method-assign, assignment]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip gradients by norm, after mixed precision has unscaled them."""
        largest = self.recipe.gradient_clip_val
        if largest is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), largest)
            if isinstance(optimizer, DOT):
                optimizer.scale_distillation((largest / (norm + 1e-6)).clamp(max=1.0))  # as torch does

    def on_fit_start(self) -> None:
        """Compare the optimizers with those of a checkpoint whose state they will take."""
        super().on_fit_start()
        self.begin_split()
        if self._resumed_optimizers and self.trainer.ckpt_path is not None:
            compare_optimizers(self._resumed_optimizers, self.trainer.optimizers)
            compare_schedules(self._resumed_schedules, self.trainer.lr_scheduler_configs)
        self._resumed_optimizers, self._resumed_schedules = [], []

    def on_train_start(self) -> None:
        """Follow the schedule of the settings; warn about parameters without an optimizer, and rates without effect."""
        super().on_train_start()
        if self._rate_changed:  # the finder sets one rate for all groups of all optimizers
            self._rate_changed = False
            if self.trainer.ckpt_path is None:
                self.trainer.strategy.setup_optimizers(self.trainer)
            else:
                rank_zero_warn(
                    f"the learning rate {self.lr:g} was set after the optimizer was made, whose state comes from "
                    f"{self.trainer.ckpt_path}, and is not used; set it before the fit"
                )
        self._resume_loader()
        changes: list[str] = []
        for config in self.trainer.lr_scheduler_configs:
            settings = self._schedule_settings.get(id(config.scheduler))
            changes += take_settings(config.scheduler, settings) if settings else []
        if changes:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            rank_zero_only(print)(f"the schedule is changed: {', '.join(changes)}; the learning rate is now {rate:g}")
        scales = self._learning_rate_scales()
        overridden = type(self).configure_optimizers is not OpenOptimizers.configure_optimizers
        rates = {group["lr"] for group in self.trainer.optimizers[0].param_groups}
        if scales and overridden and len(rates) == 1:
            name, (scale, _) = next(iter(scales.items()))
            owner = "student.backbone_lr_scale" if name == "backbone" else f"method {type(self.method).__name__}"
            rank_zero_warn(
                f"{owner} trains {name} at {scale} times the learning rate, and "
                f"{type(self).__name__}.configure_optimizers does not; call self.scale_learning_rates(optimizer) there"
            )
        held = set(map(id, parameters_of(*self.trainer.optimizers)))
        left = [name for name, each in self.named_parameters() if each.requires_grad and id(each) not in held]
        if left:
            them = f"{left[0]} and {len(left) - 1} more parameters are" if left[1:] else f"{left[0]} is"
            rank_zero_warn(
                f"{them} in no optimizer and learn only if code of yours trains them; add them in "
                f"{type(self).__name__}.configure_optimizers (self.learner_groups() has those of the student and the "
                "method), or freeze them with requires_grad_(False)"
            )

    def _resume_loader(self) -> None:
        """Let a resumed run continue in the middle of an epoch.

        Lightning loses the loader's position if ``configure_optimizers`` reads ``trainer.estimated_stepping_batches``,
        because that creates the loader before the checkpoint is restored.
        """
        loop = self.trainer.fit_loop
        if loop.restarting and loop._combined_loader_states_to_load:
            loop._load_combined_loader_states()
            iter(cast(Any, loop._data_fetcher))

    @property
    def lr(self) -> float:
        """Learning rate of the student's optimizer, which Lightning's ``LearningRateFinder`` reads and replaces.

        Where the optimizer is a function without an ``lr``, it is what was assigned, for the sub-class that did so.
        """
        found = getattr(vars(self).get("optimizer_factory"), "keywords", {}).get("lr", vars(self).get("_own_lr"))
        if found is None:
            raise AttributeError("lr")
        return float(found)

    @lr.setter
    def lr(self, value: float) -> None:
        factory = vars(self).get("optimizer_factory")
        if factory is None or "lr" not in inspect.signature(factory).parameters:
            self._own_lr = value
            return
        self.optimizer_factory = functools.partial(factory, lr=float(value))
        self._rate_changed = self._trainer is not None
        if (stored := self.hparams.get("optimizer")) is not None:
            stored["init_args"]["lr"] = float(value)

    _rate_changed = False

    def learner_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of student and method, without learning rates.

        For an overridden ``configure_optimizers``: ``AdamW(self.learner_groups(), lr=1e-3)`` trains at 1e-3.
        """
        slow = self._backbone_parameters()
        taken = {id(each) for each in slow}
        groups: list[dict[str, Any]] = [
            {"name": "student", "params": [each for each in self.student.parameters() if id(each) not in taken]}
        ]
        groups += [{"name": "backbone", "params": slow}] if slow else []
        groups += [{"name": each["name"], "params": each["params"]} for each in self.method.parameter_groups()]
        for group in groups:
            group["params"] = [each for each in group["params"] if each.requires_grad]
        groups = [each for each in groups if each["params"]]
        return groups if self.recipe.decay_norm_and_bias else without_decay(groups)

    def _backbone_parameters(self) -> list[nn.Parameter]:
        """Parameters with a learning rate of their own; none where that is the student's."""
        scale = self.student_config.backbone_lr_scale
        return [] if scale == 1.0 else slow_parameters(self.student, self.student_config)

    def _learning_rate_scales(self) -> dict[str, tuple[float, list[nn.Parameter]]]:
        """Factors of learning rates that are not the student's, with their parameters, by the name of the group."""
        groups = {each["name"]: (each["lr_scale"], each["params"]) for each in self.method.parameter_groups()}
        if slow := self._backbone_parameters():
            groups["backbone"] = (self.student_config.backbone_lr_scale, slow)
        return {name: each for name, each in groups.items() if each[0] != 1.0}

    def scale_learning_rates(self, optimizer: Optimizer) -> None:
        """Multiply the learning rates of groups that are trained more slowly or faster than the student.

        Args:
            optimizer: Optimizer of `learner_groups`, without a schedule yet.
        """
        found = self._learning_rate_scales().values()
        scales = {id(each): scale for scale, parameters in found for each in parameters}
        scale_learning_rates(optimizer, scales)

    def _schedule(self, optimizer: Optimizer, name: str, *, own_rate: bool) -> dict[str, Any]:
        """Build a learning rate schedule in Lightning's form; `own_rate` keeps the optimizer's rate as the largest."""
        trainer, per_epoch = self.trainer, 1.0
        if trainer.max_steps >= 0:
            trainer.fit_loop.setup_data()  # which num_training_batches needs
        length = float(epochs_of_fit(trainer) or math.inf)
        if self.recipe.interval == "step":
            length = float(trainer.estimated_stepping_batches)
            trainer.fit_loop.setup_data()
            per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        with refused_arguments("lr_scheduler", self.scheduler_factory):
            scheduler = build_scheduler(
                self.scheduler_factory,
                optimizer,
                self.recipe,
                steps_per_epoch=per_epoch,
                length=length,
                own_rate=own_rate,
            )
        self._schedule_settings[id(scheduler)] = schedule_settings(scheduler)
        found = {"scheduler": scheduler, "name": name, "interval": self.recipe.interval}
        if not reads_metric(scheduler):
            return found
        self._check_plateau()
        return {
            **found,
            "monitor": "val/loss",
            "reduce_on_plateau": True,
            "frequency": trainer.check_val_every_n_epoch,
        }

    def _check_plateau(self) -> None:
        """Refuse a schedule that reads ``val/loss`` where there is none at the time of its steps."""
        data = data_of(self.trainer)
        if self.recipe.interval == "step":
            problem = "recipe.interval is step; set it to epoch"
        elif self.trainer.check_val_every_n_epoch is None:
            problem = "validation is counted in steps; set trainer.check_val_every_n_epoch to 1"
        elif not self.trainer.enable_validation:
            problem = "there is no validation; choose another schedule"
        elif getattr(data, "val_is_test", False):
            problem = "validation reads the test set; hold validation data out with data.val_fraction"
        else:
            return
        raise ACKDError(f"ReduceLROnPlateau reads val/loss after an epoch and {problem}")

    def configure_optimizers(self) -> Any:
        """Build the student's optimizer, those of the method, and their schedules."""
        if not any(each.requires_grad for each in self.student.parameters()):
            raise ACKDError(
                "no parameter of the student learns (requires_grad is false in all of them); call module.unfreeze(), "
                "or name fewer parts in student.freeze"
            )
        with refused_arguments("optimizer", self.optimizer_factory):
            optimizer = self.optimizer_factory(self.learner_groups())
        self.scale_learning_rates(optimizer)
        return self.add_method_optimizers([optimizer], [self._schedule(optimizer, "lr", own_rate=False)])

    def add_method_optimizers(
        self, optimizers: list[Optimizer], schedules: list[Any]
    ) -> tuple[list[Optimizer], list[Any]]:
        """Add the optimizers of the method, on the schedule of the module.

        Args:
            optimizers: The student's optimizer.
            schedules: Its schedule in Lightning's form; may be empty.
        """
        self._rate_changed = False
        own = self.method.auxiliary_optimizers()
        self._follow_student([*optimizers, *own.values()], schedules)
        added = [self._schedule(each, f"lr/{name}", own_rate=True) for name, each in own.items()]
        return [*optimizers, *own.values()], self._without_monitors([*schedules, *added])

    def _follow_student(self, optimizers: Sequence[Optimizer], schedules: Sequence[Any]) -> None:
        """Give the method's optimizers the student's learning rate where they ask for it, and say which rate it is."""
        schedulers = [each["scheduler"] if isinstance(each, Mapping) else each for each in schedules]
        for optimizer in optimizers[1:]:
            alike = all(isinstance(each, SGD) for each in (optimizer, optimizers[0]))
            rate = follow_student(optimizer, optimizers[0], schedulers, same_kind=alike)
            if rate is None:
                continue
            first = optimizer.param_groups[0]["params"][0]
            name = next(name for name, parameters in self.auxiliary.items() if parameters[0] is first)
            own, other = type(optimizer).__name__, type(optimizers[0]).__name__
            why = "the student's largest" if alike else f"since the student's is for {other}"
            rank_zero_only(print)(
                f"{name} of method {type(self.method).__name__}: {own} with learning rate {rate:g}, {why}"
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule; one that reads a metric after every epoch was stepped before checkpoints were written.

        Args:
            scheduler: Schedule.
            metric: Value of the metric that it reads; None if it reads none.
        """
        if not any(each.scheduler is scheduler for each in self._plateaus()):
            super().lr_scheduler_step(scheduler, metric)

    def _plateaus(self) -> list[Any]:
        """Schedules that read a metric after every epoch, which Lightning would step after checkpoints are written."""
        if not self.automatic_optimization:
            return []
        found = self.trainer.lr_scheduler_configs
        return [each for each in found if each.reduce_on_plateau and each.interval == "epoch"]

    def on_train_epoch_end(self) -> None:
        """Step schedules that read a metric. Runs before checkpoints are written."""
        super().on_train_epoch_end()
        for config in self._plateaus() if is_whole_epoch(self.trainer) else ():
            metrics = self.trainer.callback_metrics
            validated = (self.current_epoch + 1) % config.frequency == 0
            metric = metrics.get(str(config.monitor)) if validated else None
            if metric is None and validated and config.strict:
                raise metric_missing(str(config.monitor), metrics)
            scheduler = cast(LRScheduler, config.scheduler)
            if metric is not None or reads_metric(scheduler):  # a warm-up goes on without a metric
                step_scheduler(scheduler, metric)

    def _without_monitors(self, schedules: list[Any]) -> list[Any]:
        """Keep the names of monitored metrics; Lightning would warn and forget them in manual optimization."""
        if self.automatic_optimization:
            return schedules
        found = []
        for each in schedules:
            if isinstance(each, Mapping):
                if each.get("monitor") is not None:
                    self.monitors[id(each["scheduler"])] = str(each["monitor"])
                each = {key: each[key] for key in each if key not in ("monitor", "reduce_on_plateau", "strict")}
            found.append(each)
        return found
