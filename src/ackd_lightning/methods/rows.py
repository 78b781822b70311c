"""Memories with a row for each training image (for CRD and AIKD)."""

from __future__ import annotations

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.types import Batch


def check_rows(batch: Batch, targets: Tensor, method: str, otherwise: str = "") -> None:
    """Refuse a batch whose indices are not positions in the training set.

    Args:
        batch: First batch of a fit.
        targets: Class of each training image.
        method: Name of the method.
        otherwise: What a user can do instead, at the end of the message.

    Raises:
        ACKDError: If the training images are unknown, or an index is of another image.
    """
    rows = len(targets)
    if not rows:
        raise ACKDError(f"the training images are unknown to method {method}; call begin_fit with their targets")
    index, target = batch.index.to(targets.device), batch.target.to(targets.device)
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= rows:
        raise ACKDError(
            f"batch.index is from {low} to {high} and method {method} has {rows} training images; the data must return "
            f"(image, target, index) with the position of the image in the training set{otherwise}"
        )
    if not torch.equal(targets[index], target):
        raise ACKDError(
            f"batch.index does not fit batch.target in method {method}: an image has another class than "
            "`train_targets` states for its index; both must describe the same training set"
        )


def last_of(index: Tensor) -> Tensor:
    """Return the last place at which each image of a batch stands in it.

    Args:
        index: Image at each place, ``B`` int64.

    Examples:
        >>> last_of(torch.tensor([7, 3, 7]))
        tensor([2, 1, 2])
    """
    places = torch.arange(len(index), device=index.device)
    return torch.where(index[:, None] == index[None, :], places, -1).amax(dim=1)
