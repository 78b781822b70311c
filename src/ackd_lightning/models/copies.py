"""Copies of networks that can be run without changing the originals, and what is known about a network at sight."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.types import ImageSize, height_width

MOST_CHANNELS = 16
"""Largest number of channels of an image."""
_COLOURS = 4
"""Largest number of channels of a usual image, with transparency."""

EXAMPLES = 2
"""Number of images on which a network is tried."""


WATCH = "_stage_watch"
"""Attribute of a network that holds the hooks on its stages."""


def channels_by_name(channels: int) -> dict[str, int]:
    """Return the option of `create_model` for a number of channels: nothing for three, as most networks have them.

    Args:
        channels: Number of channels of the images.
    """
    return {"in_chans": channels} if channels != 3 else {}


def image_channels(network: nn.Module, otherwise: int = 3) -> int:
    """Number of channels of the images that a network reads: those of its first convolution.

    A first one that reads more than four is no longer believed where another one reads three: a class may define its
    layers in another order than it calls them.

    Args:
        network: Any network. One whose convolutions are not modules, or where another one than the first reads the
            images, states them in an attribute ``image_channels``. A network of timm whose first convolution has too
            many, because it reads blocks of pixels or their frequencies (TResNet, CSATv2), states them in
            ``pretrained_cfg``.
        otherwise: Number for a network without convolutions.
    """
    if isinstance(given := (getattr(network, "model_options", None) or {}).get("in_chans"), int):
        return given
    for each in network.modules():
        if isinstance(each, nn.Conv2d):
            config = getattr(network, "pretrained_cfg", None)
            if each.in_channels > MOST_CHANNELS and isinstance(config, dict) and "input_size" in config:
                return int(config["input_size"][0])
            others = (one.in_channels for one in network.modules() if isinstance(one, nn.Conv2d))
            return 3 if each.in_channels > _COLOURS and 3 in others else each.in_channels
        if isinstance(stated := getattr(each, "image_channels", None), int):
            return stated
    return otherwise


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside a student with auxiliary learners, or inside one that is fine-tuned for int8.

    Args:
        network: Any network. One that wraps nothing is returned itself, whatever its own attributes are called.
    """
    while hasattr(type(network), "wrapped"):
        network = cast("nn.Module", network.wrapped)
    return network


def name_of(network: nn.Module) -> str:
    """Return the name under which a network was created, or else that of its class.

    Args:
        network: Any network.
    """
    own = unwrapped(network)
    return str(getattr(network, "model_name", None) or getattr(own, "model_name", None) or type(own).__name__)


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the type of a network's first floating-point parameter.

    Args:
        network: Any network.
    """
    return next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.get_default_dtype())


def load_tensors(
    network: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True, assign: bool = False
) -> Any:
    """Load tensors by name into a network, as those of the version that its modules have.

    A plain mapping, such as that of a ``.safetensors`` file, does not state versions, without which torchvision's
    MNASNet loads nothing. Norm layers are left without one: torch then completes files that have no
    ``num_batches_tracked``.

    Args:
        network: Network.
        tensors: Tensors by the names of the network.
        strict: Whether the names must be the network's.
        assign: Whether the network takes the tensors themselves.

    Returns:
        What ``load_state_dict`` returns: names that are missing or unknown.
    """
    versions: dict[str, Any] = getattr(network.state_dict(), "_metadata", {})
    state: Any = OrderedDict(tensors)
    norms = {name for name, module in network.named_modules() if isinstance(module, _NormBase)}
    state._metadata = {name: each for name, each in versions.items() if name not in norms}
    return network.load_state_dict(state, strict=strict, assign=assign)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a network: parameters, buffers, and others in attributes of its modules."""
    for module in network.modules():
        yield from (each for each in pytree.tree_leaves(vars(module)) if isinstance(each, Tensor))


def clone(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a network, also one with tensors that were computed, such as the weights of an old ``weight_norm``.

    Args:
        network: Any network.
        memo: Copies that exist already, by the identity of their originals, as for ``copy.deepcopy``.

    Raises:
        ACKDError: If the network holds something that cannot be copied.
    """
    memo = {} if memo is None else memo
    for each in _tensors(network):
        if not each.is_leaf:
            memo.setdefault(id(each), each.detach().clone())
    try:
        result = copy.deepcopy(network, memo)
    except Exception as error:  # a network may hold anything
        raise ACKDError(
            f"{name_of(network)} cannot be copied ({first_line(error)}); keep what cannot be copied, such as locks, "
            "generators and open files, out of the attributes of its modules"
        ) from error
    for parameter in result.parameters():
        if not parameter.is_leaf:  # TorchScript copies by an operation
            parameter.detach_().requires_grad_()
    return result


def _outer_hooks(network: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
    """Yield the hooks that are neither methods of a network's parts nor torch's, with the dict that holds each."""
    parts = {id(part) for module in network.modules() for part in (module, *vars(module).values()) if part is not None}
    for module in network.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in hooks.items():
                method = hook.func if isinstance(hook, functools.partial) else hook
                if type(hook).__module__.startswith("torch.nn.utils"):  # spectral_norm makes weights in a hook
                    continue
                if not {id(method), id(getattr(method, "__self__", None))} & parts:
                    yield hooks, key


def hooks_remedy(network: nn.Module) -> str:
    """Return what helps a network whose copy cannot be run without its hooks; nothing if the copy has them all.

    Args:
        network: Network whose copy cannot be run.
    """
    watched = any(WATCH in vars(module) for module in network.modules())  # by hooks of this package
    if watched or not any(True for _ in _outer_hooks(network)):
        return ""
    return "; if its forward needs hooks, make them methods of the network, as others are left out when it is tried"


def twin(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a network in evaluation mode, without hooks that would write to something else than the copy.

    Args:
        network: Any network.
        memo: Copies that exist already, by the identity of their originals, as for ``copy.deepcopy``.

    Raises:
        ValueError: If the network is shared with its copies, as a ``FrozenTeacher`` is: probe its ``network``.
    """
    result = clone(network, memo)
    if result is network:
        raise ValueError(f"{type(network).__name__} is shared with its copies and cannot be probed; probe its network")
    for hooks, key in list(_outer_hooks(result)):
        del hooks[key]
    for module in result.modules():
        module.__dict__.pop(WATCH, None)
    return in_evaluation(result)


def in_evaluation(network: nn.Module) -> nn.Module:
    """Put a network into evaluation mode without what it computed there before, such as LeViT's attention biases.

    Args:
        network: Network; networks of timm empty what they keep when training begins.
    """
    network.train()
    network.eval()
    return network


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def skeleton(network: nn.Module, input_size: ImageSize, *, channels: int | None = None) -> tuple[nn.Module, Tensor]:
    """Copy the structure of a network to the meta device, where running it computes shapes alone.

    Weights are not copied; mode, hooks and buffers of the network stay as they are.

    Args:
        network: Any network.
        input_size: Height and width of the image in pixels.
        channels: Channels of the image; None for those of the network's first convolution.

    Returns:
        The copy in evaluation mode, and an image ``1 x channels x H x W`` to run it on.

    Raises:
        ValueError: If the network is shared with its copies, as a ``FrozenTeacher`` is: probe its ``network``.
    """
    # deepcopy takes from the memo what it finds there, so that no weight is copied
    ghost = twin(network, {id(each): _on_meta(each) for each in _tensors(network)})
    shape = (1, image_channels(network) if channels is None else channels, *height_width(input_size))
    return ghost, torch.empty(shape, device="meta", dtype=dtype_of(network))


def examples(
    network: nn.Module, input_size: ImageSize, *, channels: int | None = None
) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield a copy of a network and images to run it on: first without computing, then, where there are weights, with.

    Args:
        network: Any network.
        input_size: Height and width of the images in pixels.
        channels: Channels of the images; None for those of the network's first convolution.
    """
    ghost, image = skeleton(network, input_size, channels=channels)
    yield ghost, image.expand(EXAMPLES, *image.shape[1:]).clone()
    tensors = [*network.parameters(), *network.buffers()]
    if not any(each.is_meta for each in tensors):
        shape = (EXAMPLES, image_channels(network) if channels is None else channels, *height_width(input_size))
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
        yield twin(network), image.to(tensors[0].device if tensors else "cpu", dtype_of(network))
