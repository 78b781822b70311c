"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

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
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay

    def decay_after(self, steps: float) -> float:
        """Return the share of the average that stays in the next step.

        Args:
            steps: Number of steps that have been averaged.
        """
        return min(self.decay, (1 + steps) / (10 + steps))

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, steps: Tensor | int) -> None:
        if torch.is_floating_point(averaged[0]):
            update: Any = get_ema_multi_avg_fn(self.decay_after(float(steps)))  # type: ignore[no-untyped-call]  # torch's
            values = [value.to(average.dtype) for average, value in zip(averaged, current, strict=True)]
            update(averaged, values, steps)  # the average is in float32 in every precision
            return
        for average, value in zip(averaged, current, strict=True):
            average.copy_(value)
