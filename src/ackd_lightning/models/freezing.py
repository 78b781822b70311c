"""Parts of a network that are not trained, and the mode that they need for that; statistics that are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.models.copies import name_of
from ackd_lightning.models.finding import plan_for, traced
from ackd_lightning.models.stages import stage_parts
from ackd_lightning.models.weight_files import tell

_FROZEN = "_frozen_statistics"
"""Attribute of a frozen module without parameters."""


def parts_by_stage(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the modules and parameters of each stage by ``stem``, ``stage1``, ``stage2``, ...; empty if unknown.

    Args:
        network: Any network.
    """
    plan = plan_for(network)
    if plan is None:
        return {}
    found = traced(network)
    return stage_parts(*found[:2], plan.features) if found else {}


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Stop training parts of a network: their parameters get no gradient. One line names these parts.

    Args:
        network: Network, changed in place.
        names: Names of stages (``stem``, ``stage1``, ...) or of modules; what is both names the stage.

    Raises:
        ACKDError: If the network has no such part, or nothing is left to train.
    """
    if not names:
        return
    stages = parts_by_stage(network)
    modules = {name: module for name, module in network.named_modules() if name}
    for name in names:
        if name not in stages and name not in modules:
            known = [*stages, *modules]
            raise ACKDError(
                f"student.freeze names {name!r} and {name_of(network)} has no such part; {near_matches(name, known)}"
            )
        if not (stages[name] if name in stages else [*modules[name].parameters(), *modules[name].buffers()]):
            raise ACKDError(f"student.freeze names {name!r}, which has no weights and no statistics; leave it out")
    parts = list(dict.fromkeys(each for name in names for each in stages.get(name, (name,))))
    for each in parts:
        part = modules.get(each)
        (network.get_parameter(each) if part is None else part).requires_grad_(False)
        if part is not None and not any(True for _ in part.parameters()):
            setattr(part, _FROZEN, True)
    if not any(each.requires_grad for each in network.parameters()):
        raise ACKDError(f"student.freeze is {list(names)}, which leaves nothing to train; leave a part out")
    tell(f"the student {name_of(network)} has frozen parts: {', '.join(parts)}")


def frozen_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules whose parameters are all frozen, and frozen ones that have statistics alone.

    Args:
        module: Module whose parts are searched.
    """
    parameters = list(module.parameters())
    if (parameters and not any(each.requires_grad for each in parameters)) or getattr(module, _FROZEN, False):
        yield module
        return
    for child in module.children():
        yield from frozen_modules(child)


@contextlib.contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Keep the running statistics of BatchNorm; in training mode batches are normalised by their own statistics.

    Args:
        network: Network with BatchNorm layers.
    """
    layers = [each for each in network.modules() if isinstance(each, _NormBase) and each.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextlib.contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Compute no gradient for parameters inside the block; gradients still flow through what uses them.

    Args:
        parameters: Trainable parameters.
    """
    held = list(parameters)
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def evaluated(*networks: nn.Module) -> Iterator[None]:
    """Run networks in evaluation mode without gradients for their parameters; gradients still flow through them.

    Modes and ``requires_grad`` are restored afterwards.

    Args:
        networks: Networks whose weights and buffers must not change.
    """
    modes = [(layer, layer.training) for network in networks for layer in network.modules()]
    try:
        for layer, _ in modes:
            layer.training = False
        with frozen(each for network in networks for each in network.parameters() if each.requires_grad):
            yield
    finally:
        for layer, training in modes:
            layer.training = training
