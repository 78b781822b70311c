"""Weights that grow at the start of a training."""

from __future__ import annotations

from ackd_lightning.models.weight_files import tell


def linear_warmup(epoch: int, epochs: int, *, first: int = 1) -> float:
    """Return the share of the full weight in an epoch of a linear warm-up.

    Args:
        epoch: Number of the epoch, from 0.
        epochs: Length of the warm-up; 0 for none.
        first: 1 for 1 / epochs in the first epoch, 0 to start at 0.

    Examples:
        >>> [linear_warmup(epoch, 4) for epoch in (0, 1, 3, 9)]
        [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, (epoch + first) / epochs) if epochs else 1.0


def tell_if_shorter(method: str, term: str, warmup_epochs: int, epochs: int | None) -> None:
    """Say that a fit ends before the weight of a term has grown to its full value.

    Args:
        method: Name of the method.
        term: Name of the term.
        warmup_epochs: Length of the warm-up.
        epochs: Length of the fit; None when it is not limited by epochs.
    """
    if epochs is not None and 0 < epochs < warmup_epochs:
        tell(
            f"the weight of {method}'s term {term!r} grows over {warmup_epochs} epochs and the fit has {epochs}, so it "
            f"ends at {epochs / warmup_epochs:.0%}; warmup_epochs of the method sets another length"
        )
