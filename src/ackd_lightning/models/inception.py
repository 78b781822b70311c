"""What weight files of torchvision's GoogLeNet and Inception v3 hold beside their network, and what they leave open."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ackd_lightning.errors import first_names
from ackd_lightning.models.copies import image_channels
from ackd_lightning.models.weight_files import tell

_AUXILIARY = ("aux1", "aux2", "AuxLogits")


def without_auxiliary(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Leave out the auxiliary classifiers, which no prediction needs, and say so.

    Args:
        tensors: Tensors of the file by the names of the network.
        own: State dict of the network.
        file: Where the tensors come from, for the message.
    """
    extra = [key for key in tensors if key not in own and key.partition(".")[0] in _AUXILIARY]
    if extra:
        tell(f"{file}: {len(extra)} tensors of auxiliary classifiers are not read ({first_names(extra)})")
    return {key: tensor for key, tensor in tensors.items() if key not in extra}


def say_transform(network: nn.Module, metadata: Mapping[str, Any], file: str) -> None:
    """Say in one line where a network may change its images in another way than the one whose weights it takes.

    With ``transform_input`` these networks change the normalisation of their images first, and no tensor shows it.

    Args:
        network: Network that took the weights.
        metadata: What the file states; one of this package states the options of its network.
        file: Where the weights come from.
    """
    if not callable(getattr(network, "_transform_input", None)) or image_channels(network) != 3:
        return  # no other network of torchvision has it, and it needs three channels
    stated, has = None, bool(getattr(network, "transform_input", False))
    ours = {"model", "num_classes"} <= metadata.keys()  # files of this package leave empty options out
    with contextlib.suppress(TypeError, ValueError):
        stated = json.loads(metadata.get("model_options", "{}" if ours else "null"))
    if isinstance(stated, dict):
        if bool(stated.get("transform_input")) != has:
            tell(
                f"{file} states transform_input {not has} and its network is built with {has}, so its logits are "
                "others; leave out the option, or give it as the file states it"
            )
    elif not has and "transform_input" not in (getattr(network, "model_options", None) or {}):
        tell(
            f"{file} does not state transform_input, so its network reads normalised images as they are; torchvision's "
            "own weights change them first: for these, give the network the option transform_input: true"
        )
