"""Means of what a training step logs, with one addition a step and one collective call an epoch, and over processes.

Lightning's ``self.log`` takes up to a millisecond for each value and step, which slows small networks down. The sums
that are kept here reach ``self.log`` with the last batch of an epoch, or at the end of an epoch that was cut short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class TermMeans:
    """Means over an epoch of scalars of every batch, weighted by the batch size.

    Sums stay on the device until they are read. Terms that only some steps have are averaged over these steps.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._means: dict[str, Tensor] | None = None

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], size: int) -> None:
        """Add the values of one batch.

        Args:
            values: Tensors with one element by name, all on one device; may be empty.
            size: Batch size.
        """
        if not values:
            return
        self._means, names = None, tuple(values)
        numbers = [value.detach().float().reshape(()) for value in values.values()]
        step = torch.stack([*numbers, torch.ones_like(numbers[0])]) * size
        self._sums[names] = self._sums[names].add_(step) if names in self._sums else step

    def compute(self) -> dict[str, Tensor]:
        """Return the means over the batches of all processes so far.

        Every process must call it. A second call without a new batch costs nothing.

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
        """Discard all batches."""
        self._sums, self._means = {}, None


@torch.no_grad()
def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over all processes, in one exchange; every process must call it.

    Args:
        tensors: Tensors of one type, of the same number and shapes in every process; none: nothing happens.
    """
    if tensors:
        joined = torch.cat([each.flatten() for each in tensors])
        dist.all_reduce(joined)
        joined /= dist.get_world_size()
        for each, mean in zip(tensors, torch.split(joined, [each.numel() for each in tensors]), strict=True):
            each.copy_(mean.view_as(each))
