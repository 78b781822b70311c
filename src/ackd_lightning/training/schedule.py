"""Learning rate and its schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ackd_lightning.errors import ACKDError


def check_recipe(
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    milestones: Sequence[int],
    lr_decay: float,
    warmup_epochs: int,
    gradient_clip_val: float | None,
) -> None:
    """Refuse numbers that no training can have; arguments as in ``DistillationModule``.

    Raises:
        ACKDError: naming them.
    """
    if lr <= 0 or momentum < 0 or weight_decay < 0:
        raise ACKDError(
            f"lr {lr}, momentum {momentum}, weight_decay {weight_decay}: lr must be above 0, the others 0 or more"
        )
    if momentum >= 1 or lr_decay <= 0 or warmup_epochs < 0 or any(each < 0 for each in milestones):
        raise ACKDError(
            f"momentum {momentum}, lr_decay {lr_decay}, warmup_epochs {warmup_epochs}, milestones "
            f"{list(milestones)}: momentum must be below 1, lr_decay above 0, the others 0 or more"
        )
    if gradient_clip_val is not None and gradient_clip_val <= 0:
        raise ACKDError(f"gradient_clip_val is {gradient_clip_val}; it must be above 0, or left out for no clipping")


def stepped(
    optimizer: torch.optim.Optimizer, milestones: Sequence[int], *, lr_decay: float, warmup_epochs: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate that is multiplied at milestones, after a linear warm-up; one step an epoch.

    Args:
        optimizer: whose learning rates follow.
        milestones: epochs.
        lr_decay: factor at each.
        warmup_epochs: 0 for none.
    """
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma=lr_decay)
    if not warmup_epochs:
        return steps
    start = 1.0 / (warmup_epochs + 1)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=warmup_epochs)
    return torch.optim.lr_scheduler.ChainedScheduler([steps, warmup], optimizer)
