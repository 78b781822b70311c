"""Size and cost of a network."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ackd_lightning.models.copies import examples
from ackd_lightning.types import ImageSize


def count_parameters(model: nn.Module) -> int:
    """Count the numbers in all parameters of a network, frozen ones included; buffers are not parameters.

    Args:
        model: Any network.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, input_size: ImageSize, channels: int = 3) -> int:
    """Count the multiply-adds of convolutions and linear layers for one image.

    Adding biases, normalisation, activations and pooling are not counted; the products inside attention are. A copy is
    run on the meta device, where nothing is computed, and on a random image if it reads values there. Mode, hooks and
    buffers of the network stay as they are.

    Args:
        model: Network that maps images ``1 x channels x H x W`` to logits.
        input_size: Side of the image in pixels, or its height and width.
        channels: Channels of the image.
    """
    problem: Exception | None = None
    for copied, image in examples(model, input_size, channels=channels):
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), counter:
                copied(image[:1])
        except Exception as error:  # the forward of a network can raise anything on the meta device
            problem = error
        else:
            return int(counter.get_total_flops()) // 2  # two operations for each multiply-add
    assert problem is not None
    raise problem
