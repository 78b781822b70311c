"""Convolutions of the CIFAR networks, and their initial weights."""

from __future__ import annotations

import math

from torch import nn


def conv3x3(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias that keeps H and W at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, groups=groups, bias=False)


def init_convolutions(network: nn.Module) -> None:
    """Draw every convolution of ``network`` from N(0, 2 / (kernel area * output channels)).

    For ungrouped convolutions this is He initialisation with ``fan_out``. For depthwise ones the variance is smaller
    than that rule gives, because the public CIFAR networks count all output channels and not those of one group.

    Source:
        He et al., "Delving Deep into Rectifiers", arXiv:1502.01852, section 2.2 (backward case).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            area = math.prod(module.kernel_size)
            nn.init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / (area * module.out_channels)))
