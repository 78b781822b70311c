"""Weights alone as ``.safetensors``, also with half of the bits; the network is built from its description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.formats.program import Opened
from ackd_lightning.deploy.student import build
from ackd_lightning.models.weights import read_metadata, save_weights

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types that weights can be stored in."""


def write(network: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the weights of a network in the type that the metadata name (``dtype``), those of BatchNorm in float32.

    BatchNorm's are few and decide most of the rounding error, since they scale whole channels.

    Args:
        network: Network in evaluation mode.
        example: Two images; not used.
        path: File to write.
        metadata: Text for the file.
    """
    dtype = DTYPES[metadata.get("dtype", "float32")]
    kept = tuple(f"{name}." for name, each in network.named_modules() if isinstance(each, _NormBase))
    state = {
        key: value.to(dtype) if value.is_floating_point() and not key.startswith(kept) else value
        for key, value in network.state_dict().items()
    }
    save_weights(state, path, metadata)


def open_file(path: Path) -> Opened:
    """Build the network that a file describes, on the CPU and in float32, whatever the type of the weights.

    Args:
        path: ``.safetensors`` file.

    Raises:
        ACKDError: If the file does not say which network it has, or does not have it.
    """
    metadata = read_metadata(path)
    network = build(Description.from_metadata(metadata, str(path)), path)

    def run(images: Tensor) -> Tensor:
        return cast("Tensor", network(images))

    return Opened(run, metadata, network)
