"""BatchNorm fusion: the same function in evaluation mode, with each BatchNorm inside the convolution before it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ackd_lightning.models.copies import clone

_TOLERANCE = 1e-3
"""Largest difference of an output, relative to its largest value, that is put down to rounding in float32."""


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


def _pairs(network: nn.Module, run: Callable[[nn.Module], object]) -> list[tuple[str, str]]:
    """List the names of each convolution and of the BatchNorm that reads its output, where both are called once."""
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensor, because another one could take its place in memory
    calls: collections.Counter[str] = collections.Counter()
    found: list[tuple[str, str]] = []
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and {"weight", "bias"} <= module._parameters.keys():  # and not computed

            def after(_: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
                calls[name] += 1
                made[id(output)] = (name, output)

            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:

            def before(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                calls[name] += 1
                if id(inputs[0]) in made:
                    found.append((made[id(inputs[0])][0], name))

            hooks.append(module.register_forward_pre_hook(before))
    run(network)
    for hook in hooks:
        hook.remove()
    return [pair for pair in found if all(calls[name] == 1 for name in pair)]


@torch.no_grad()
def fused(network: nn.Module, run: Callable[[nn.Module], Sequence[Tensor]]) -> nn.Module | None:
    """Copy a network in evaluation mode and fuse its BatchNorms with the convolutions before them, where possible.

    A convolution whose output is also read elsewhere must not change. That cannot be seen from outside, so all outputs
    of the copy are compared with the network's own.

    Args:
        network: Any network; it is not changed.
        run: Function that runs a network on an example and returns the outputs that must stay the same.

    Returns:
        The fused copy; None if nothing can be fused, or if an output would differ by more than rounding.
    """
    result = clone(network).eval()
    pairs = _pairs(result, run)
    if not pairs:
        return None
    expected = run(result)
    for convolution, norm in pairs:
        first, second = result.get_submodule(convolution), result.get_submodule(norm)
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.BatchNorm2d)
        _replace(result, convolution, fuse_conv_bn_eval(first, second))
        _replace(result, norm, nn.Identity())
    for ours, theirs in zip(run(result), expected, strict=True):
        if theirs.numel() and float((ours - theirs).abs().max()) > _TOLERANCE * float(theirs.abs().max()):
            return None
    return result.requires_grad_(False)
