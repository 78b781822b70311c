"""Non-finite losses: found before they reach a checkpoint, and reported with their term and a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ackd_lightning.errors import NonFiniteError
from ackd_lightning.training.means import average_over_processes
from ackd_lightning.training.schedule import parameters_of

OnNonFinite = Literal["stop", "skip"]
_TOLD = 3  # skipped steps that are reported one by one


@dataclass
class _Step:
    """Values of one step that are being copied from the device."""

    names: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None
    place: str


class NonFiniteGuard:
    """Check the loss of every training step.

    ``stop``: On a CPU a step is checked before its backward pass. On a GPU its values are copied without waiting and
    checked when the next step begins and before a checkpoint is written. So no step waits for the device, the error
    comes one step late, and no checkpoint holds weights from after the step. ``skip``: Every step is checked before
    its backward pass, which waits for the device. All processes stop at, or skip, a step that one of them must.

    Args:
        on_nonfinite: How to handle a non-finite loss: end the run, or skip the step.
    """

    def __init__(self, on_nonfinite: OnNonFinite) -> None:
        self.on_nonfinite = on_nonfinite
        self.skipping = False  # the current step
        self.skipped = 0
        self.skipped_in_epoch = 0
        self.finite_in_epoch = 0
        self._waiting: list[_Step] = []

    def must_skip(self, module: L.LightningModule, values: Mapping[str, Tensor]) -> bool:
        """Check the loss terms of a step.

        Args:
            module: Module in training.
            values: Unweighted scalars by name.

        Returns:
            Whether to skip the step; always False with ``stop``.

        Raises:
            NonFiniteError: With ``stop``, for this step or, on a GPU, for the step before.
        """
        joined = _with_flag(torch.stack([value.detach().float() for value in values.values()]))
        if self.on_nonfinite == "skip":
            self.skipping = self._skip(module, tuple(values), joined)
            return self.skipping
        place = f"step {module.global_step + 1:,} (epoch {module.current_epoch + 1})"
        if any(step.place != place for step in self._waiting):
            self.flush(module)
        arrived = None
        if joined.is_cuda:
            joined = torch.empty_like(joined, device="cpu", pin_memory=True).copy_(joined, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._waiting.append(_Step(tuple(values), joined, arrived, place))
        if arrived is None:
            self.flush(module)
        return False

    def flush(self, module: L.LightningModule) -> None:
        """Check steps whose values are still being copied from the device.

        Args:
            module: Module in training.

        Raises:
            NonFiniteError: Naming step, term, learning rate and remedies.
        """
        steps, self._waiting = self._waiting, []
        for step in steps:
            if step.arrived is not None:
                step.arrived.synchronize()
            if (bad := _which(step.names, step.values)) is not None:
                raise NonFiniteError(
                    f"the loss is not finite in {step.place}: {bad}, learning rate {learning_rate(module):.3g}; "
                    f"{remedies(module)}; existing checkpoints are finite, and on_nonfinite=skip skips such steps"
                )

    def _skip(self, module: L.LightningModule, names: tuple[str, ...], values: Tensor) -> bool:
        if not int(values[-1]):
            self.finite_in_epoch += "loss" in names  # the last check of a step
            return False
        self.skipped += 1
        self.skipped_in_epoch += 1
        if self.skipped <= _TOLD:
            found = _which(names, values)
            last = "; later ones are only counted" if self.skipped == _TOLD else ""
            rank_zero_warn(
                f"the loss is not finite in epoch {module.current_epoch + 1} ({found}, learning rate "
                f"{learning_rate(module):.3g}), so this batch is skipped, {self.skipped} in all{last}"
            )
        return True

    def end_epoch(self, module: L.LightningModule) -> None:
        """Check the last step, and refuse an epoch whose steps were all skipped.

        Args:
            module: Module in training.

        Raises:
            NonFiniteError: If every step of the epoch was skipped.
        """
        self.flush(module)
        finite, skipped = self.finite_in_epoch, self.skipped_in_epoch
        self.finite_in_epoch = self.skipped_in_epoch = 0
        if skipped and not finite:
            raise NonFiniteError(
                f"the loss was finite in none of the {skipped} steps of epoch {module.current_epoch + 1}, learning "
                f"rate {learning_rate(module):.3g}; {remedies(module)}; existing checkpoints are finite"
            )


def _with_flag(values: Tensor) -> Tensor:
    """Add 1 if a value is not finite in this process or in another one, else 0, without waiting for the device."""
    bad = (~torch.isfinite(values)).any().to(values.dtype)[None]
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return torch.cat([values, bad])


def _which(names: tuple[str, ...], values: Tensor) -> str | None:
    """Return the non-finite terms with their values, or None when all are finite in every process."""
    *numbers, anywhere = values.tolist()
    bad = [f"{name} = {value}" for name, value in zip(names, numbers, strict=True) if not math.isfinite(value)]
    bad = bad[:-1] if len(bad) > 1 and bad[-1].startswith("loss =") else bad
    return ", ".join(bad) or ("in another process" if anywhere else None)


def learning_rate(module: L.LightningModule) -> float:
    """Return the learning rate of the first parameter group.

    Args:
        module: Module in training.
    """
    return float(module.trainer.optimizers[0].param_groups[0]["lr"])


def remedies(module: L.LightningModule) -> str:
    """Return what to change after a non-finite loss, in the order in which to try it.

    Args:
        module: Module in training.
    """
    advice = [f"lower the optimizer's lr (it is {learning_rate(module):.3g} now)"]
    recipe = getattr(module, "recipe", None)
    if recipe is not None and not recipe.warmup_epochs:
        advice.append("start slowly with recipe.warmup_epochs 5")
    if recipe is not None and recipe.gradient_clip_val is None:
        advice.append("clip with recipe.gradient_clip_val 5")
    plugin = module.trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.precision == "16-mixed":
        advice.insert(0, "train in precision bf16-mixed instead of 16-mixed")
    return ", or ".join(advice)


def check_weights(module: L.LightningModule, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Refuse to write non-finite weights.

    Args:
        module: Module in training.
        state: State dict.
        names: Entries that must be finite.

    Raises:
        NonFiniteError: Naming one of them.
    """
    chosen = {name: state[name] for name in names if name in state and state[name].is_floating_point()}
    if not chosen:
        return
    finite = torch.stack([torch.isfinite(value).all() for value in chosen.values()]).tolist()
    bad = [name for name, fine in zip(chosen, finite, strict=True) if not fine]
    if bad:
        raise NonFiniteError(
            f"the weights are not finite after epoch {module.current_epoch + 1} ({len(bad)} of {len(chosen)} tensors, "
            f"first {bad[0]}), so no checkpoint was written and the one before is kept; learning rate "
            f"{learning_rate(module):.3g}; {remedies(module)}"
        )


def batchnorm_statistics(*modules: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return buffers of BatchNorm and copies of them, to undo a forward pass.

    Args:
        modules: Modules whose layers are searched.
    """
    layers = [each for module in modules for each in module.modules() if isinstance(each, _NormBase)]
    return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]


class SkippingModule(L.LightningModule):
    """A module that can skip a step and undo what the step has changed.

    Attributes:
        guard: Checks the losses; set by the sub-class.
    """

    guard: NonFiniteGuard
    _has_gradient = False  # of a batch since the last step
    _stepped = True

    def networks_in_training(self) -> Iterable[nn.Module]:
        """Return the networks whose BatchNorm a forward pass changes."""
        raise NotImplementedError(f"{type(self).__name__} has no method `networks_in_training`")

    def statistics_before(self) -> list[tuple[Tensor, Tensor]]:
        """Return what a skipped step must restore: BatchNorm's buffers, and copies of them."""
        return batchnorm_statistics(*self.networks_in_training()) if self.guard.on_nonfinite == "skip" else []

    @torch.no_grad()
    def skips(self, values: Mapping[str, Tensor], before: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Check a step; with ``on_nonfinite="skip"`` return whether to skip it, and undo what it changed.

        Args:
            values: Unweighted scalars by name.
            before: Buffers as ``statistics_before`` returned them.

        Raises:
            NonFiniteError: With ``on_nonfinite="stop"``, if a value is not finite.
        """
        if not self.guard.must_skip(self, values):
            return False
        for buffer, copy in before:
            buffer.copy_(copy)
        return True

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, except for a skipped batch."""
        if not self.guard.skipping:
            super().backward(loss, *args, **kwargs)
            self._has_gradient = True

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step the optimizer, unless all batches of the step were skipped."""
        if self.guard.on_nonfinite == "stop" or optimizer_closure is None:
            return super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        loss = optimizer_closure()
        if self.guard.skipping and self._has_gradient and self.trainer.world_size > 1:
            # DDP reduces the gradients of an accumulation in the backward pass of its last batch, which was skipped
            average_over_processes([each.grad for each in parameters_of(optimizer) if each.grad is not None])
        self._stepped, self._has_gradient = self._has_gradient, False
        if self._stepped:
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        return None

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule, except for one by step after a skipped step."""
        by_step = any(
            each.scheduler is scheduler and each.interval == "step" for each in self.trainer.lr_scheduler_configs
        )
        skipped = not self._stepped if self.automatic_optimization else self.guard.skipping
        if not (by_step and skipped):
            super().lr_scheduler_step(scheduler, metric)

    def on_train_epoch_end(self) -> None:
        """Check the epoch's last step, and log how many steps were skipped."""
        self.guard.end_epoch(self)
        if self.guard.on_nonfinite == "skip":
            self.log("train/skipped", float(self.guard.skipped))
