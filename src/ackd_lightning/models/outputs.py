"""What networks and their modules return, read as logits and feature maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ackd_lightning.errors import ACKDError

_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that is put down to rounding (float32)."""


def logits_of(output: Any, whose: str = "the network") -> Tensor:
    """Find the logits in what a network returns.

    Args:
        output: Tensor ``B x K``, ``B x K x 1 x 1``; an object or dict with ``logits``; a tuple or list that begins
            with the logits. The mean is taken if all it holds are tensors of their shape (as the two heads of a
            distilled DeiT); anything else, such as features or None, is passed over.
        whose: Name of the network in the error message.

    Returns:
        Logits ``B x K``.

    Raises:
        ACKDError: If there are none.
    """
    found: Any = output
    if isinstance(found, dict):
        found = found["logits"] if "logits" in found else next(iter(found.values())) if len(found) == 1 else found
    elif hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, tuple | list) and found and isinstance(found[0], Tensor):
        same = all(isinstance(each, Tensor) and each.shape == found[0].shape for each in found)
        found = torch.stack(tuple(found)).mean(dim=0) if same and len(found) > 1 else found[0]
    if isinstance(found, Tensor) and found.dim() == 4 and found.shape[2:] == (1, 1):
        found = found.flatten(1)
    if isinstance(found, Tensor) and found.dim() == 2 and found.is_floating_point():
        return found
    if isinstance(found, Tensor):
        kind = f"a tensor of the shape {tuple(found.shape)}"
        if not found.is_floating_point():
            kind += f" and the type {found.dtype}"
    else:
        kind = f"a {type(found).__name__}" + (f" with {', '.join(map(str, found))}" if isinstance(found, dict) else "")
    raise ACKDError(
        f"{whose} returns {kind}, and logits B x K are needed; return them alone, or as `logits` of a dict or an object"
    )


def same_logits(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are equal up to rounding.

    Args:
        found: Logits ``B x K`` in float32.
        expected: Logits ``B x K`` in float32.
        dtype: Type of the weights that they were computed with.
    """
    rounding = max(_TOLERANCE, 8 * torch.finfo(dtype).eps)
    allowed = rounding * float(expected.abs().nan_to_num(0.0, posinf=0.0).max())
    return torch.allclose(found, expected, rtol=0.0, atol=allowed, equal_nan=True)


def tensors_in(output: Any) -> list[Tensor]:
    """Return every tensor in what a module returns.

    Args:
        output: Any nested tuples, lists, dicts and objects with tensors.
    """
    found = [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor)]
    if not found and hasattr(output, "to_tuple"):
        found = [each for each in pytree.tree_leaves(output.to_tuple()) if isinstance(each, Tensor)]
    return found


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor with at least three dimensions, or else the first tensor, in what a module returns.

    Args:
        output: Any nested tuples, lists, dicts and objects with tensors.
    """
    found = tensors_in(output)
    return next((each for each in found if each.dim() >= 3), found[0] if found else None)


def as_map(output: Any, ratio: float, prefix: int | None = None) -> Tensor | None:
    """Read what a module returns as a feature map.

    Args:
        output: Map ``B x C x H x W`` or ``B x H x W x C``, or tokens ``B x N x C``, any class token first.
        ratio: Height of the image divided by its width.
        prefix: Number of the tokens in front; None for the smallest number that leaves a grid of the image's shape.

    Returns:
        ``B x C x H x W``; None for anything else.
    """
    tensor = first_tensor(output)
    if tensor is None or not tensor.is_floating_point():
        return None
    if tensor.dim() == 4:
        _, first, second, third = tensor.shape
        last = _fits(first, second, ratio)
        if _fits(second, third, ratio) and not (last and abs(first - second * ratio) < abs(second - third * ratio)):
            return tensor
        return tensor.permute(0, 3, 1, 2) if last else None
    if tensor.dim() == 3:
        count = tensor.shape[1]
        for skipped in range(min(count, 17)) if prefix is None else (prefix, 0):  # some join them after some blocks
            height = round(math.sqrt((count - skipped) * ratio))
            width = (count - skipped) // max(height, 1)
            if height * width == count - skipped > 0 and _fits(height, width, ratio):
                grid: Tensor = tensor[:, skipped:].transpose(1, 2)
                return grid.reshape(*grid.shape[:2], height, width)
    return None


def _fits(height: int, width: int, ratio: float) -> bool:
    """Whether a grid has the shape of the image, up to the rounding of strides."""
    return abs(height - width * ratio) <= max(1.0, ratio) * (0 if ratio == 1 else 1)
