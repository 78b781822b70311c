"""Means of what a training step logs: one addition a step and one collective call an epoch.

Lightning's ``self.log`` costs up to a millisecond for each value and step, which small networks feel. What is added
up here reaches ``self.log`` with the last batch of an epoch, or at the epoch's end when it was cut short.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class TermMeans:
    """Means over an epoch of scalars that come batch by batch, weighted by the batch size.

    They stay on the device until somebody looks. Terms that are not there in every step are averaged over the steps
    that have them.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._means: dict[str, Tensor] | None = None

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], size: int) -> None:
        """Count one batch.

        Args:
            values: tensors of one number by name, all on one device; none is fine.
            size: B.
        """
        if not values:
            return
        self._means, names = None, tuple(values)
        numbers = [value.detach().float().reshape(()) for value in values.values()]
        step = torch.stack([*numbers, torch.ones_like(numbers[0])]) * size
        self._sums[names] = self._sums[names].add_(step) if names in self._sums else step

    def compute(self) -> dict[str, Tensor]:
        """Means of all processes' batches so far; every process has to call it, and those after the first are free.

        Returns:
            float32 scalars by name.
        """
        if self._means is None:
            totals: dict[str, Tensor] = {}
            for names, sums in self._sums.items():
                if dist.is_available() and dist.is_initialized():
                    sums = sums.clone()
                    dist.all_reduce(sums)
                for name, value in zip(names, sums[:-1], strict=True):
                    pair = torch.stack([value, sums[-1]])
                    totals[name] = totals[name] + pair if name in totals else pair
            self._means = {name: pair[0] / pair[1] for name, pair in totals.items()}
        return self._means

    def reset(self) -> None:
        """Start an epoch."""
        self._sums, self._means = {}, None
