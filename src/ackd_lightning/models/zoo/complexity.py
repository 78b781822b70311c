"""The size and the cost of a network."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in all parameters of ``model``, frozen ones included; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, input_size: int, channels: int = 3) -> int:
    """Count the multiply-adds of convolutions and linear layers for one image.

    Additions of biases, normalisation, activations and pooling are not counted; products inside attention are. The
    count is made on the meta device: nothing is computed, and mode, hooks and buffers of ``model`` stay as they are.

    Args:
        model: a network that maps images (1, channels, input_size, input_size) to logits.
        input_size: H and W of the image, in pixels.
        channels: channels of the image.
    """
    parameters = list(model.parameters())
    tensors: list[Tensor] = [*parameters, *model.buffers()]
    # what stands in the memo is not copied: a copy of the structure alone, without a copy of the weights
    memo: dict[int, Any] = {id(tensor): _on_meta(tensor) for tensor in tensors}
    skeleton = copy.deepcopy(model, memo).eval()
    for module in skeleton.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    dtype = parameters[0].dtype if parameters else torch.get_default_dtype()
    image = torch.empty((1, channels, input_size, input_size), device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        skeleton(image)
    return int(counter.get_total_flops()) // 2  # two operations for each multiply-add


def _on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, dtype and kind without data."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
