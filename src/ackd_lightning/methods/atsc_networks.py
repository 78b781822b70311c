"""Distances of ATSC between features and from a teacher's first weights, and copies of teachers that are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.methods.pairing import same_size
from ackd_lightning.models.copies import clone


def feature_distance(projected: Tensor, feature: Tensor) -> Tensor:
    """Return the squared distance of the projected map of the student from the teacher's, mean over all entries.

    Gradients flow into both. The larger map is pooled to the size of the smaller.

    Args:
        projected: Projected map ``B x C x H x W`` of the student.
        feature: Feature map ``B x C x H' x W'`` of the teacher.

    Returns:
        Scalar float32, in squared units of the teacher's feature.
    """
    return F.mse_loss(*same_size(projected.float(), feature.float()))


def anchor_distance(parameters: Sequence[Tensor], start: Tensor) -> Tensor:
    r"""Return the distance of a teacher from its first weights, \(\sum_W \|\theta_0 - \theta\|^2\).

    Gradients flow into the parameters, not into the start.

    Args:
        parameters: Parameters of any shapes, N numbers in total.
        start: First values of the same parameters, flattened and joined, ``N``.

    Returns:
        Scalar float32, in squared units of the parameters.

    Examples:
        >>> anchor_distance([torch.ones(2, 2), torch.tensor([5.0])], torch.tensor([1.0, 1.0, 1.0, 3.0, 4.0]))
        tensor(5.)
    """
    now = torch.cat([parameter.flatten() for parameter in parameters]).float()
    return (start.detach().float() - now).square().sum()


def trainable_copy(network: nn.Module) -> nn.Module:
    """Return a copy in float32 and training mode, with zeros for weights that are on the meta device.

    Args:
        network: Network to copy, perhaps on the meta device.
    """
    own = clone(network)
    if any(each.is_meta for each in (*own.parameters(), *own.buffers())):
        own = own.to_empty(device="cpu")
        with torch.no_grad():
            for each in (*own.parameters(), *own.buffers()):
                each.zero_()
    return own.float().requires_grad_(True).train()
