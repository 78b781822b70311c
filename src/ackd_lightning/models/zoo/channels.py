"""Networks of the CIFAR benchmarks and of torchvision for images with another number of channels than 3."""

from __future__ import annotations

from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import MOST_CHANNELS

OPTION = "in_chans"
"""Option of `create_model` with the number of channels, as timm calls it."""


def channels_option(options: dict[str, object], name: str) -> tuple[int, dict[str, object]]:
    """Take the number of channels out of the options of a network.

    Args:
        options: Options for `create_model`.
        name: Name of the network.

    Returns:
        Number of channels, and the other options.

    Raises:
        ACKDError: If the number is not one from 1 to 16.
    """
    rest = dict(options)
    channels = rest.pop(OPTION, 3)
    if isinstance(channels, bool) or not isinstance(channels, int) or not 1 <= channels <= MOST_CHANNELS:
        raise ACKDError(
            f"option {OPTION!r} of {name!r} is {channels!r}; it must be a whole number from 1 to {MOST_CHANNELS}"
        )
    return channels, rest


def read_channels(network: nn.Module, channels: int) -> nn.Module:
    """Replace the first convolution of a network by one with fresh weights that reads another number of channels.

    The weights have the standard deviation of those that they replace.

    Args:
        network: Network whose first convolution reads 3 channels; changed in place.
        channels: Number of channels of the images.
    """
    if channels == 3:
        return network
    name, first = next((name, each) for name, each in network.named_modules() if isinstance(each, nn.Conv2d))
    conv = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]  # torch's own attribute, a tuple of any length for mypy
        stride=first.stride,  # type: ignore[arg-type]
        padding=first.padding,  # type: ignore[arg-type]
        dilation=first.dilation,  # type: ignore[arg-type]
        bias=first.bias is not None,
        padding_mode=first.padding_mode,
    )
    if not first.weight.is_meta:
        nn.init.normal_(conv.weight, std=float(first.weight.detach().std()))
        if first.bias is not None and conv.bias is not None:
            conv.bias.data.copy_(first.bias.data)
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, conv)
    return network
