"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ackd_lightning.validation import Range, checked


class EMA(WeightAveraging):
    """Exponential moving average of the weights, with a warm-up of the decay.

    The average is used for validation and test, and is what checkpoints and exports hold. Buffers are averaged as the
    weights are, and those of whole numbers are copied.

    Args:
        decay: Share of the average that stays in a step. After n steps the share is at most (1 + n) / (10 + n).

    Examples:
        >>> average = EMA(decay=0.999)
        >>> [round(average.decay_after(steps), 3) for steps in (0, 90, 100_000)]
        [0.1, 0.91, 0.999]
    """

    @checked
    def __init__(self, *, decay: Annotated[float, Range(0, 1, open_high=True)] = 0.9999) -> None:
        super().__init__()
        self.decay = decay
        self._exact: list[torch.Tensor] | None = None  # the average while the module has it, rounded

    def decay_after(self, steps: float) -> float:
        """Return the share of the average that stays in the next step.

        Args:
            steps: Number of steps that have been averaged.
        """
        return min(self.decay, (1 + steps) / (10 + steps))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the module when a fit begins, without its teachers, whose outputs the average does not need."""
        if stage != "fit":
            return
        self._exact = None  # of a fit that ended in its validation
        self._average_model = _Average(pl_module, self._device or pl_module.device, self.decay_after)
        if (teachers := getattr(self._average_model.module, "teachers", None)) is not None:
            teachers.release()

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        """Swap the weights and their average, whose float32 values come back as they were from a half-precision module.

        Args:
            pl_module: Module that is trained.
        """
        average: Any = self._average_model
        tensors = [*average.module.parameters(), *average.module.buffers()]
        kept, self._exact = self._exact, None
        if kept is None and any(
            each.dtype != own.dtype
            for each, own in zip(tensors, (*pl_module.parameters(), *pl_module.buffers()), strict=True)
        ):
            self._exact = [each.detach().clone() for each in tensors]
        super()._swap_models(pl_module)
        if kept is not None:
            for each, value in zip(tensors, kept, strict=True):
                each.data.copy_(value)


class _Average(AveragedModel):
    """Average that counts its steps on the host: torch's own reads the number from the device three times a step."""

    def __init__(self, model: nn.Module, device: Any, decay_after: Callable[[float], float]) -> None:
        super().__init__(model, device=device, use_buffers=True)
        self.n_averaged = torch.zeros((), dtype=torch.long)
        self.decay_after = decay_after

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take a step of the average, or copy the weights before the first one.

        Args:
            model: Module that is trained.
        """
        steps = int(self.n_averaged)
        averages, values = ([*each.parameters(), *each.buffers()] for each in (self.module, model))
        averaged, current = [], []
        for average, value in zip(averages, values, strict=True):
            if steps and average.is_floating_point():
                averaged.append(average)
                current.append(value.to(average))  # the average is in float32 in every precision
            else:
                average.copy_(value)
        if averaged:
            update: Any = get_ema_multi_avg_fn(self.decay_after(steps))  # type: ignore[no-untyped-call]  # torch's
            update(averaged, current, steps)
        self.n_averaged += 1
