"""Weights that grow at the start of a training."""

from __future__ import annotations


def linear_warmup(epoch: int, epochs: int, *, first: int = 1) -> float:
    """Return the share of the full weight in an epoch of a linear warm-up.

    Args:
        epoch: Number of the epoch, from 0.
        epochs: Length of the warm-up; 0 for none.
        first: 1 for 1 / epochs in the first epoch, 0 to start at 0.

    Example:
        >>> [linear_warmup(epoch, 4) for epoch in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, (epoch + first) / epochs) if epochs else 1.0
