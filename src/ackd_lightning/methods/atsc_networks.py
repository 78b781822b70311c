"""Distances of ATSC between features and from a teacher's first weights, and the parts of a teacher that it shares."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.pairing import same_size
from ackd_lightning.models.finding import require_plan, traced
from ackd_lightning.models.outputs import logits_of


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

    Example:
        >>> anchor_distance([torch.ones(2, 2), torch.tensor([5.0])], torch.tensor([1.0, 1.0, 1.0, 3.0, 4.0]))
        tensor(5.)
    """
    now = torch.cat([parameter.flatten() for parameter in parameters]).float()
    return (start.detach().float() - now).square().sum()


def shared_classifier(network: nn.Module, *, fixed: bool = False) -> nn.Linear:
    """Return the classifier of a teacher that a student can share.

    Args:
        network: Network of a teacher.
        fixed: Whether the classifier is only read. A 1 x 1 convolution that reads the pooled map, as some networks of
            timm have, is then returned as a linear layer with copies of its weights.

    Raises:
        ACKDError: If the classifier is unknown, or is not a linear layer with a bias.
    """
    plan = require_plan(network, f"the teacher {type(network).__name__}", "method ATSC")
    found = network if plan.classifier is None else network.get_submodule(plan.classifier)
    while isinstance(found, nn.Sequential) and len(found) == 1:
        found = found[0]
    if fixed and isinstance(found, nn.Conv2d) and found.bias is not None and _reads_pooled(network, found):
        linear = nn.Linear(found.in_channels, found.out_channels, device="meta")
        linear.weight = nn.Parameter(found.weight.detach().flatten(1), requires_grad=False)
        linear.bias = nn.Parameter(found.bias.detach(), requires_grad=False)
        return linear
    if not isinstance(found, nn.Linear) or found.bias is None:
        raise ACKDError(
            f"the classifier of the teacher {type(network).__name__} is {found}, and method ATSC shares a linear layer "
            "with a bias; choose another teacher"
        )
    return found


def _reads_pooled(network: nn.Module, layer: nn.Conv2d) -> bool:
    """Whether a convolution is the last layer of a network and reads one position."""
    example = traced(network)
    name = next(name for name, module in network.named_modules() if module is layer)
    if example is None or layer.kernel_size != (1, 1) or layer.groups != 1:
        return False
    copied, image, _ = example
    seen: list[tuple[Tensor, Tensor]] = []
    handle = copied.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    try:
        logits = logits_of(copied(image))
    finally:
        handle.remove()
    ((given, out),) = seen
    return given.shape[2:] == (1, 1) and out.numel() == logits.numel()


def trainable_copy(network: nn.Module) -> nn.Module:
    """Return a copy in training mode, with zeros for weights that are on the meta device.

    Args:
        network: Network to copy, perhaps on the meta device.
    """
    own = copy.deepcopy(network)
    if any(each.is_meta for each in (*own.parameters(), *own.buffers())):
        own = own.to_empty(device="cpu")
        with torch.no_grad():
            for each in (*own.parameters(), *own.buffers()):
                each.zero_()
    return own.requires_grad_(True).train()
