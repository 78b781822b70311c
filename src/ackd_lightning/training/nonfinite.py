"""A loss that is no finite number: found before it reaches a checkpoint, told with its term and a remedy."""

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

OnNan = Literal["stop", "skip"]
ON_NAN = ("stop", "skip")
_TOLD = 3  # steps that are named one by one


@dataclass
class _Step:
    """Values of one step on their way from the device."""

    names: tuple[str, ...]
    values: Tensor
    arrived: torch.cuda.Event | None
    place: str


class FiniteGuard:
    """Judges the loss of every training step.

    ``stop``: on a CPU the step is judged before its backward pass. On a GPU its values are copied without waiting, and
    judged when the next step begins, and before a checkpoint is written; so no step waits for the device, the error is
    one step late, and no checkpoint holds weights from behind the step. ``skip``: every step is judged before its
    backward pass, which waits for the device; processes agree, and all of them skip a step that one of them must skip.

    Args:
        on_nan: what a loss that is not finite does.
    """

    def __init__(self, on_nan: OnNan) -> None:
        self.on_nan = on_nan
        self.skipping = False  # the step that is being made
        self.skipped = 0
        self.skipped_in_epoch = 0
        self.finite_in_epoch = 0
        self._waiting: list[_Step] = []

    def must_skip(self, module: L.LightningModule, values: Mapping[str, Tensor]) -> bool:
        """Judge the loss terms of a step.

        Args:
            module: in training.
            values: unweighted scalars by name.

        Returns:
            Whether the step is left out; always False with ``stop``.

        Raises:
            NonFiniteError: with ``stop``, for this step or, on a GPU, the one before.
        """
        joined = torch.stack([value.detach().float() for value in values.values()])
        if self.on_nan == "skip":
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
        """Judge steps whose values are still on their way.

        Args:
            module: in training.

        Raises:
            NonFiniteError: naming step, term, learning rate and remedies.
        """
        steps, self._waiting = self._waiting, []
        for step in steps:
            if step.arrived is not None:
                step.arrived.synchronize()
            if (bad := _which(step.names, step.values)) is not None:
                raise NonFiniteError(
                    f"the loss is not finite in {step.place}: {bad}, learning rate {learning_rate(module):.3g}; "
                    f"{remedies(module)}; checkpoints that are there are finite, and --on_nan skip leaves such steps "
                    "out"
                )

    def _skip(self, module: L.LightningModule, names: tuple[str, ...], values: Tensor) -> bool:
        bad = (~torch.isfinite(values)).any().to(torch.int32)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if not int(bad):
            self.finite_in_epoch += "loss" in names  # the last judgement of a step
            return False
        self.skipped += 1
        self.skipped_in_epoch += 1
        if self.skipped <= _TOLD:
            found = _which(names, values) or "in another process"
            last = "; later ones are counted without a word" if self.skipped == _TOLD else ""
            rank_zero_warn(
                f"the loss is not finite in epoch {module.current_epoch + 1} ({found}, learning rate "
                f"{learning_rate(module):.3g}), so this step is skipped, {self.skipped} in all{last}"
            )
        return True

    def end_epoch(self, module: L.LightningModule) -> None:
        """Judge the last step, and an epoch of which nothing was left.

        Args:
            module: in training.

        Raises:
            NonFiniteError: when no step of the epoch was carried out.
        """
        self.flush(module)
        finite, skipped = self.finite_in_epoch, self.skipped_in_epoch
        self.finite_in_epoch = self.skipped_in_epoch = 0
        if skipped and not finite:
            raise NonFiniteError(
                f"the loss was finite in none of the {skipped} steps of epoch {module.current_epoch + 1}, learning "
                f"rate {learning_rate(module):.3g}; {remedies(module)}; checkpoints that are there are finite"
            )


def _which(names: tuple[str, ...], values: Tensor) -> str | None:
    """The terms that are not finite with their values; None when all are."""
    numbers = zip(names, values.tolist(), strict=True)
    bad = [f"{name} = {value}" for name, value in numbers if not math.isfinite(value)]
    return ", ".join(bad[:-1] if len(bad) > 1 and bad[-1].startswith("loss =") else bad) or None


def learning_rate(module: L.LightningModule) -> float:
    """Learning rate of the first parameter group.

    Args:
        module: in training.
    """
    return float(module.trainer.optimizers[0].param_groups[0]["lr"])


def remedies(module: L.LightningModule) -> str:
    """What to change after a loss that was not finite, in the order in which to try it.

    Args:
        module: in training.
    """
    advice = [f"lower --model.lr (it is {getattr(module, 'lr', math.nan):.3g})"]
    if not getattr(module, "warmup_epochs", 1):
        advice.append("start slowly with --model.warmup_epochs 5")
    if getattr(module, "clip_norm", 1) is None:
        advice.append("clip with --model.gradient_clip_val 5")
    plugin = module.trainer.precision_plugin
    if isinstance(plugin, MixedPrecision) and plugin.precision == "16-mixed":
        advice.insert(0, "train in --trainer.precision bf16-mixed instead of 16-mixed")
    return ", or ".join(advice)


def check_weights(module: L.LightningModule, state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Refuse to write weights that are not finite.

    Args:
        module: in training.
        state: a state dict.
        names: the entries that have to be finite.

    Raises:
        NonFiniteError: naming one of them.
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
    """Buffers of BatchNorm and copies of them, to be written back after a forward pass that is not to count.

    Args:
        modules: whose layers are looked through.
    """
    layers = [each for module in modules for each in module.modules() if isinstance(each, _NormBase)]
    return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]


class SkippingModule(L.LightningModule):
    """A module some of whose steps are left out, with all that such a step has changed.

    Attributes:
        guard: judges the losses; set by the sub-class.
    """

    guard: FiniteGuard

    def networks_in_training(self) -> Iterable[nn.Module]:
        """Those whose BatchNorm a forward pass changes."""
        raise NotImplementedError(f"{type(self).__name__} has no method `networks_in_training`")

    def statistics_before(self) -> list[tuple[Tensor, Tensor]]:
        """What a forward pass changes and a skipped step must not: BatchNorm's buffers, and copies of them."""
        return batchnorm_statistics(*self.networks_in_training()) if self.guard.on_nan == "skip" else []

    @torch.no_grad()
    def skips(self, values: Mapping[str, Tensor], before: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Judge a step; with ``on_nan="skip"`` say whether it is left out, and take back what it changed.

        Args:
            values: unweighted scalars by name.
            before: as ``statistics_before`` gave it.

        Raises:
            NonFiniteError: with ``on_nan="stop"``, when one of them is not finite.
        """
        if not self.guard.must_skip(self, values):
            return False
        for buffer, copy in before:
            buffer.copy_(copy)
        return True

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass, but for a step that is skipped."""
        if not self.guard.skipping:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Optimizer step, but for a step that is skipped; its loss is known before, then."""
        if self.guard.on_nan == "stop" or optimizer_closure is None:
            return super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        loss = optimizer_closure()
        if not self.guard.skipping:
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        return None

    def on_train_epoch_end(self) -> None:
        """Judge the epoch's last step, and log how many were skipped."""
        self.guard.end_epoch(self)
        if self.guard.on_nan == "skip":
            self.log("train/skipped", float(self.guard.skipped))
