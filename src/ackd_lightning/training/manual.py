"""Steps of the other players, then the learners' step: the only file that knows about manual optimisation.

Every oddity here answers a measured trap: stepping two optimizers through Lightning doubles ``global_step``; a second
backward breaks DDP's reducer; manual optimisation switches off DDP's buffer broadcast; raw optimizer steps ignore the
loss scale of 16-bit training. The tests name them one by one.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.ackd import ACKD
from ackd_lightning.methods.base import AdversarialMethod, Method
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.types import NetOutput


@contextlib.contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradient for parameters inside the block; gradients still flow through what is computed with them.

    Args:
        parameters: all trainable.
    """
    held = list(parameters)
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


class AdversarialModule(DistillationModule):
    """Trains a student beside further players: one student forward, a step of every player, a learners' step.

    Only learners' steps count in ``global_step``, so ``max_steps``, ``every_n_train_steps``, ``fast_dev_run`` and
    weight averaging mean what they mean elsewhere. The constructor is that of [`DistillationModule`][].
    """

    def _finish(self) -> None:
        self.automatic_optimization = False
        players = {id(parameter) for parameters in self.game.players().values() for parameter in parameters}
        # read by torch's DistributedDataParallel: the players' gradients are reduced here, not by its buckets
        self._ddp_params_and_buffers_to_ignore += [
            name for name, each in self.named_parameters() if id(each) in players
        ]

    def _check_method(self, method: Method) -> None:
        if not isinstance(method, AdversarialMethod):
            raise ACKDError(f"method {type(method).__name__} has no discriminators; train it with DistillationModule")

    @property
    def game(self) -> AdversarialMethod:
        """The method, which is known to have players."""
        return cast(AdversarialMethod, self.method)

    def _optimizers(self) -> tuple[LightningOptimizer, list[LightningOptimizer]]:
        found = self.optimizers()
        return (found[0], found[1:]) if isinstance(found, list) else (found, [])

    # ---------------------------------------------------------------- hooks

    def on_fit_start(self) -> None:
        """Start all processes with the same players: DDP does not send parameters that it ignores."""
        if dist.is_available() and dist.is_initialized():
            for parameters in self.game.players().values():
                for parameter in parameters:
                    dist.broadcast(parameter.data, 0)

    def _rearm_buffer_sync(self) -> None:
        """Ask DDP to send BatchNorm's buffers again: in manual optimisation Lightning leaves that switched off."""
        wrapped = self.trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.require_forward_param_sync = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keyed noise, and BatchNorm buffers equal on all processes."""
        self._rearm_buffer_sync()
        super().on_train_batch_start(batch, batch_idx)

    def on_validation_start(self) -> None:
        """BatchNorm buffers equal on all processes."""
        self._rearm_buffer_sync()

    def on_train_epoch_end(self) -> None:
        """Step both schedules: Lightning does not in manual optimisation. Runs before checkpoints are written."""
        super().on_train_epoch_end()
        schedulers = self.lr_schedulers()
        with warnings.catch_warnings():  # a player that sits out its first epochs has a schedule all the same
            warnings.filterwarnings("ignore", ".*before `optimizer.step\\(\\)`.*")
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
                cast(torch.optim.lr_scheduler.LRScheduler, scheduler).step()

    # ---------------------------------------------------------------- steps

    def _backward(self, loss: Tensor) -> None:
        """Backward outside autocast, as in automatic optimisation.

        Lightning runs ``training_step`` under autocast, and a backward pass there would round what was computed in
        float32 on purpose.
        """
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def _player_step(self, parameters: Sequence[nn.Parameter], loss: Tensor, optimizer: LightningOptimizer) -> None:
        """Backward, reduce over processes, step; not counted in ``global_step``.

        Args:
            parameters: the player's.
            loss: which reaches nobody else.
            optimizer: of the player.
        """
        strategy = self.trainer.strategy
        parallel = isinstance(strategy, ParallelStrategy)
        optimizer.zero_grad()
        with strategy.block_backward_sync() if parallel else contextlib.nullcontext():  # type: ignore[attr-defined]
            self._backward(loss)
        if parallel and self.trainer.world_size > 1:
            gradients = [each.grad for each in parameters if each.grad is not None]
            joined = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(joined)
            joined /= self.trainer.world_size
            parts = torch.split(joined, [each.numel() for each in gradients])
            for gradient, mean in zip(gradients, parts, strict=True):
                gradient.copy_(mean.view_as(gradient))
        # through the strategy: precision plugin and hooks run, Lightning's step counter does not
        strategy.optimizer_step(optimizer.optimizer, lambda: None)

    def _sums(self, student: NetOutput) -> dict[str, Tensor]:
        """Sums of the learners' logits, which tell before the players learn that the learners cannot."""
        logits = {"logits": student.logits}
        logits.update({f"logits_aux{number}": branch.logits for number, branch in enumerate(student.branches)})
        return {name: scores.detach().float().sum() for name, scores in logits.items()}

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        """One student forward; backward and step of every player; backward and step of the learners."""
        batch = self.as_batch(batch)
        learner_optimizer, optimizers = self._optimizers()
        before = self.statistics_before()
        student, teacher = self.outputs(batch)
        players = self.game.players()
        for (player, parameters), optimizer in zip(players.items(), optimizers, strict=True):
            turn = self.game.player_loss(player, student, teacher, batch)
            if turn is None:
                continue
            loss, values = turn
            if self.skips({player: loss, **self._sums(student)}, before):
                return
            self._player_step(parameters, loss, optimizer)
            self.means.add(values, batch.image.shape[0])
        with frozen(parameter for parameters in players.values() for parameter in parameters):
            terms = self.method(student, teacher, batch)
            loss = self.weighted_loss(terms)
            if self.skips({**terms, "loss": loss}, before):
                return
            learner_optimizer.zero_grad()
            self._backward(loss)
        with torch.no_grad():
            self.method.observe(student, teacher, batch)
        learner_optimizer.step()
        self.log_terms(loss, terms, batch)

    # ---------------------------------------------------------------- optimizers

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD over student and method, and the method's optimizer of each player, on the same schedule."""
        optimizer = torch.optim.SGD(
            list(self.learner_groups()), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        optimizers: list[tuple[str, torch.optim.Optimizer]] = [("lr", optimizer)]
        optimizers += [(f"lr-{player}", self.game.player_optimizer(player)) for player in self.game.players()]
        schedulers: list[Any] = [{"scheduler": self.make_scheduler(each), "name": name} for name, each in optimizers]
        return [each for _, each in optimizers], schedulers


class ACKDModule(AdversarialModule):
    """Adversarial collaborative knowledge distillation, ready for any Lightning project.

    ``method`` is an [`ACKD`][ackd_lightning.methods.ACKD], whose arguments are the paper's hyperparameters; None gives
    the paper's two auxiliary learners and all weights 1. The constructor is that of [`DistillationModule`][].

    Example:
        >>> from ackd_lightning.models.zoo import create_model
        >>> module = ACKDModule("resnet8", 10, teacher=create_model("resnet14", 10), milestones=[10, 15])
        >>> module.student.specs
        ('D3B1', 'D2B2')
    """

    def default_method(self) -> Method:
        """ACKD with the paper's learners and weights."""
        return ACKD()
