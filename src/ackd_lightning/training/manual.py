"""Training steps of a method with several optimizers: the only file that knows about manual optimization.

Every oddity here answers a measured trap: stepping two optimizers through Lightning counts ``global_step`` twice; a
second backward pass breaks DDP's reducer; manual optimization switches off DDP's buffer broadcast; raw optimizer steps
ignore the loss scale of 16-bit training. The tests name them one by one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ackd_lightning.callbacks.length import is_whole_epoch
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.models.freezing import frozen
from ackd_lightning.training.means import average_over_processes
from ackd_lightning.training.schedule import reads_metric, step_scheduler
from ackd_lightning.training.step_log import LoggedSteps
from ackd_lightning.types import Batch, NetOutput


def metric_missing(name: str, metrics: Iterable[str]) -> ACKDError:
    """Make the error for a schedule that reads a metric that is not logged.

    Args:
        name: Name of the metric.
        metrics: Names of those that are logged.
    """
    return ACKDError(
        f"the learning rate schedule reads {name}, which is not logged; choose another schedule, or one of "
        f"{', '.join(sorted(metrics))}"
    )


class ManualSteps(LoggedSteps):
    """Steps of the auxiliary optimizers, then the student's step, after one forward pass of the student.

    Only the student's steps count in ``global_step``, so ``max_steps``, ``every_n_train_steps``, ``fast_dev_run`` and
    weight averaging mean what they mean elsewhere. A method without auxiliary optimizers is trained by automatic
    optimization, and nothing here is used.

    Attributes:
        auxiliary: Parameters of every auxiliary optimizer by its name; empty for automatic optimization.
        monitors: Metric that a schedule on a plateau reads, by ``id`` of the schedule. Lightning does not keep it in
            manual optimization.
    """

    auxiliary: dict[str, list[nn.Parameter]]
    monitors: dict[int, str]

    def outputs(self, batch: Batch) -> tuple[NetOutput, NetOutput | None]:
        """Run teacher and student once.

        Args:
            batch: Images.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `outputs`")

    def use_manual_optimization(self) -> None:
        """Switch to manual optimization and keep the auxiliary parameters out of DDP's buckets."""
        self.automatic_optimization = False
        auxiliary = {id(each) for parameters in self.auxiliary.values() for each in parameters}
        # read by torch's DistributedDataParallel: these gradients are reduced here, not by its buckets
        self._ddp_params_and_buffers_to_ignore += [
            name for name, each in self.named_parameters() if id(each) in auxiliary
        ]

    _ddp_params_and_buffers_to_ignore: list[str]

    def update_memories(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Let the method update its memories, in the precision of the forward pass.

        Args:
            student: Output of the student.
            teacher: Output of the teacher.
            batch: Batch of the step.
        """
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self.method.update(student, teacher, batch)

    # ---------------------------------------------------------------- hooks

    def on_fit_start(self) -> None:
        """Start all processes with the same auxiliary parameters, which DDP does not broadcast."""
        if dist.is_available() and dist.is_initialized():
            for parameters in self.auxiliary.values():
                for parameter in parameters:
                    dist.broadcast(parameter.data, 0)

    def rearm_buffer_broadcast(self) -> None:
        """Let DDP broadcast BatchNorm's buffers again.

        Lightning switches that off in manual optimization, and DDP itself after a batch whose gradients are not
        reduced, as the first ones of an accumulation.
        """
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_forward_param_sync = True

    def on_validation_start(self) -> None:
        """Make BatchNorm buffers equal in all processes."""
        self.rearm_buffer_broadcast()

    def _step_schedulers(self, interval: str) -> None:
        """Step the schedules of an interval, which Lightning does not do in manual optimization."""
        done = 1 + (self.trainer.fit_loop.epoch_loop.batch_idx if interval == "step" else self.current_epoch)
        with warnings.catch_warnings():  # an optimizer without steps in its first epochs has a schedule all the same
            warnings.filterwarnings("ignore", ".*before `optimizer.step\\(\\)`.*")
            for config in self.trainer.lr_scheduler_configs:
                if config.interval != interval:
                    continue
                scheduler = cast("Any", config.scheduler)
                if done % config.frequency == 0:
                    self.lr_scheduler_step(scheduler, self._monitored(scheduler) if reads_metric(scheduler) else None)
                elif reads_metric(scheduler):
                    step_scheduler(scheduler)  # an epoch without validation: the warm-up alone goes on

    def _monitored(self, scheduler: Any) -> Tensor:
        """Return the metric that a schedule on a plateau reads."""
        name, metrics = self.monitors.get(id(scheduler), "val/loss"), self.trainer.callback_metrics
        if name not in metrics:
            raise metric_missing(name, metrics)
        return metrics[name]

    def on_train_epoch_end(self) -> None:
        """Step schedules by epoch. Runs before checkpoints are written."""
        super().on_train_epoch_end()
        if not self.automatic_optimization and is_whole_epoch(self.trainer):
            self._step_schedulers("epoch")

    # ---------------------------------------------------------------- steps

    def _backward(self, loss: Tensor) -> None:
        """Run the backward pass outside autocast, as in automatic optimization.

        Lightning runs ``training_step`` under autocast, and a backward pass there would round what was computed in
        float32 on purpose.
        """
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def _auxiliary_step(self, parameters: Sequence[nn.Parameter], loss: Tensor, optimizer: LightningOptimizer) -> None:
        """Backward pass, mean over processes, optimizer step that ``global_step`` does not count."""
        strategy = self.trainer.strategy
        parallel = isinstance(strategy, ParallelStrategy)
        optimizer.zero_grad()
        with strategy.block_backward_sync() if parallel else contextlib.nullcontext():  # type: ignore[attr-defined]
            self._backward(loss)
        if parallel and self.trainer.world_size > 1:
            average_over_processes([each.grad for each in parameters if each.grad is not None])
        # through the strategy: precision plugin and hooks run, Lightning's step counter does not
        strategy.optimizer_step(optimizer.optimizer, lambda: None)

    def _sums(self, student: NetOutput) -> dict[str, Tensor]:
        """Sums of all learners' logits, which show before an auxiliary step that the student's step cannot be taken."""
        logits = {"logits": student.logits}
        logits.update({f"logits_aux{number}": each.logits for number, each in enumerate(student.branches, start=1)})
        return {name: scores.detach().float().sum() for name, scores in logits.items()}

    def manual_step(self, batch: Batch) -> None:
        """Train on one batch: a student forward, a step of every auxiliary optimizer, a step of the student.

        Args:
            batch: Images, targets and indices.
        """
        found = self.optimizers()
        optimizer, *others = found if isinstance(found, list) else [found]
        before = self.statistics_before()
        student, teacher = self.outputs(batch)
        for (name, parameters), auxiliary in zip(self.auxiliary.items(), others, strict=True):
            result = self.method.auxiliary_loss(name, student, teacher, batch)
            if result is None:
                continue
            loss, values = result
            if self.skips({name: loss, **self._sums(student)}, before):
                return
            self._auxiliary_step(parameters, loss, auxiliary)
            self.means.add({f"train/{key}": value for key, value in values.items()}, batch.image.shape[0])
        with frozen(parameter for parameters in self.auxiliary.values() for parameter in parameters):
            terms = self.method(student, teacher, batch)
            loss = weighted_loss(self.method, terms)
            if self.skips({**terms, "loss": loss}, before):
                return
            optimizer.zero_grad()
            self._backward(loss)
        self.update_memories(student, teacher, batch)
        optimizer.step()
        self._step_schedulers("step")
        self.log_terms(loss, terms, student, batch)
