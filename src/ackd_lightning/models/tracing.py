"""What happens inside a network when it reads an image: calls of its modules, and the points that all data pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ackd_lightning.models.copies import name_of
from ackd_lightning.models.outputs import as_map, first_tensor, logits_of, tensors_in

_POOLING = (
    "Mean",
    "AdaptiveAvgPool",
    "AvgPool",
    "View",
    "Reshape",
    "UnsafeView",
    "Squeeze",
    "Alias",
    "Clone",
    "Permute",
    "Transpose",
    "ToCopy",
    "AsStrided",
)
"""Autograd nodes that average a map over its positions and change nothing else."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module.

    Attributes:
        name: Name of the module.
        start: Number of the event that begins the call.
        end: Number of the event that ends it.
        shape: ``(C, H, W)`` of its output as a map; None if it is no map.
        node: Autograd node of the output's first tensor.
        nodes: Autograd nodes of all its tensors.
        value: What the module returned.
    """

    name: str
    start: int
    end: int
    shape: tuple[int, int, int] | None
    node: Any
    nodes: frozenset[Any]
    value: Any

    @property
    def depth(self) -> int:
        """Number of modules around the module."""
        return self.name.count(".")


@dataclass(slots=True)
class Trace:
    """Calls of a network's modules for one image, in the order in which they end.

    Attributes:
        calls: Every module that is called once, by name.
        spine: Modules whose output all data from image to logits pass through: where the network can be cut.
        classifier: Module that makes the logits, the last one of several; None if it is not known.
        heads: All modules that make the logits: several where the logits are those of several exits or networks.
        pooled: Modules whose map, averaged over its positions, is the classifier's input.
        logits: Logits of the example.
    """

    logits: Tensor
    calls: dict[str, Call] = field(default_factory=dict)
    spine: list[Call] = field(default_factory=list)
    classifier: str | None = None
    heads: tuple[str, ...] = ()
    pooled: frozenset[str] = frozenset()


def _paths(output: Any, image: Any) -> tuple[dict[Any, int], dict[Any, int]]:
    """Count the paths of the autograd graph from the output to each node, and from each node to the image."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(output, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(each, False) for each, _ in node.next_functions if each is not None and each not in seen]
    below: dict[Any, int] = {}
    for node in order:  # those that a node reads come before it
        below[node] = 1 if node is image else sum(below[each] for each, _ in node.next_functions if each is not None)
    above = dict.fromkeys(order, 0)
    above[output] = 1
    for node in reversed(order):
        for each, _ in node.next_functions:
            if each is not None:
                above[each] += above[node]
    return above, below


def _walk(starts: Iterable[Any], last: Collection[Any] = ()) -> Iterator[Any]:
    """Yield the nodes that some nodes read, each once, and these themselves; nothing behind the last ones."""
    seen, stack = set[Any](), list(starts)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if node not in last:
            stack += [each for each, _ in node.next_functions]


def _separate(nodes: frozenset[Any], output: Any, image: Any) -> bool:
    """Whether every path from the output to the image meets one of some nodes."""
    return not any(node is image for node in _walk([output], nodes))


def parameters_behind(network: nn.Module, nodes: Iterable[Any]) -> set[str]:
    """Return the names of a network's parameters that some autograd nodes depend on.

    Args:
        network: Network that was run, with parameters that require gradients.
        nodes: Autograd nodes of what it computed.
    """
    names = {id(each): name for name, each in network.named_parameters()}
    read = {id(getattr(node, "variable", None)) for node in _walk(nodes)}
    return {name for each, name in names.items() if each in read}


def _only_pooling(start: Any, end: Any, below: dict[Any, int]) -> bool:
    """Whether nothing but pooling happens between a node and an earlier one."""
    node = start
    while node is not end:
        if node is None or not node.name().startswith(_POOLING):
            return False
        node = next((each for each, _ in node.next_functions if each is not None and below.get(each)), None)
    return True


def trace(network: nn.Module, image: Tensor) -> Trace:
    """Run a network and record where its data pass.

    Args:
        network: Network in evaluation mode; its parameters may be on the meta device.
        image: ``B x C x H x W`` on the same device.
    """
    ratio = image.shape[2] / image.shape[3]
    prefix = getattr(network, "num_prefix_tokens", None)
    events, counts = 0, dict[str, int]()
    starts: dict[str, list[tuple[int, Tensor | None]]] = {}
    calls: list[Call] = []
    inputs: dict[str, Tensor | None] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal events
            events += 1
            counts[name] = counts.get(name, 0) + 1
            starts.setdefault(name, []).append((events, first_tensor((args, kwargs))))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, value: Any) -> None:
            nonlocal events
            events += 1
            start, inputs[name] = starts[name].pop()
            found = as_map(value, ratio, prefix)
            one_each = found is not None and len(found) == len(image)  # and not windows
            shape = cast("tuple[int, int, int]", tuple(found.shape[1:])) if found is not None and one_each else None
            tensor = first_tensor(value)
            nodes = frozenset(each.grad_fn for each in tensors_in(value) if each.grad_fn is not None)
            calls.append(Call(name, start, events, shape, None if tensor is None else tensor.grad_fn, nodes, value))

        return hook

    for name, module in network.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
    image = image.detach().clone().requires_grad_()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said again when the network itself is run
            logits = logits_of(network(image), name_of(network))
            edge = torch.autograd.graph.get_gradient_edge(image).node
    finally:
        for handle in handles:
            handle.remove()
    result = Trace(logits, {each.name: each for each in calls if counts[each.name] == 1})
    if logits.grad_fn is None:
        return result
    above, below = _paths(logits.grad_fn, edge)
    total = below[logits.grad_fn]
    if not total:
        return result
    once = list(result.calls.values())
    result.spine = [
        each
        for each in once
        if above.get(each.node, 0) * below.get(each.node, 0) == total
        or (len(each.nodes) > 1 and _separate(each.nodes, logits.grad_fn, edge))
    ]
    modules = dict(network.named_modules())
    scores = [
        each
        for each in calls
        if logits.shape[1] in _outputs(modules[each.name]) and above.get(each.node, 0) * below.get(each.node, 0)
    ]
    whole = [
        each for each in scores if each.name in result.calls and scores_images(modules[each.name], each.value, logits)
    ]
    result.classifier = whole[-1].name if whole else None
    met = set(_walk([logits.grad_fn], {each.node for each in scores}))  # up to the first scores on each path
    result.heads = tuple({each.name: None for each in scores if each.node in met})
    read = None if result.classifier is None else inputs[result.classifier]
    if read is not None:
        result.pooled = frozenset(
            each.name
            for each in result.spine
            if each.shape is not None
            and (read.dim() != 2 or read.shape[1] == each.shape[0])  # and not flattened
            and _only_pooling(read.grad_fn, each.node, below)
        )
    return result


def scores_images(module: nn.Module, value: Any, logits: Tensor) -> bool:
    """Return whether a module returns scores of images, or maps of scores, and not scores of tokens.

    Args:
        module: Module that was called.
        value: What it returned.
        logits: ``B x K`` logits of the network.
    """
    scores = first_tensor(value)
    if scores is None or scores.shape[:2] != logits.shape:
        return False
    return scores.dim() == 2 or not hasattr(module, "out_features")  # a linear layer maps the last dimension


def _outputs(module: nn.Module) -> tuple[int, ...]:
    """Widths of the output of a layer that can be a classifier."""
    return tuple(getattr(module, name, -1) for name in ("out_features", "out_channels") if hasattr(module, name))
