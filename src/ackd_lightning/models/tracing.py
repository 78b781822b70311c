"""What happens inside a network when it reads an image: calls of its modules, and the points that all data pass."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ackd_lightning.errors import ACKDError
from ackd_lightning.types import ImageSize, height_width

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


EXAMPLES = 2
"""Number of images on which a network is tried."""

WATCH = "_stage_watch"
"""Attribute of a network that holds the hooks on its stages."""


def image_channels(network: nn.Module) -> int:
    """Number of channels of the images that a network reads: those of its first convolution, 3 without one.

    Args:
        network: Any network.
    """
    return next((each.in_channels for each in network.modules() if isinstance(each, nn.Conv2d)), 3)


def name_of(network: nn.Module) -> str:
    """Return the name under which a network was created, or else that of its class.

    Args:
        network: Any network.
    """
    return str(getattr(network, "model_name", type(network).__name__))


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the type of a network's first floating-point parameter.

    Args:
        network: Any network.
    """
    return next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.get_default_dtype())


def clone(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a network, also one with tensors that were computed, such as the weights of an old ``weight_norm``.

    Args:
        network: Any network.
        memo: Copies that exist already, by the identity of their originals, as for ``copy.deepcopy``.
    """
    memo = {} if memo is None else memo
    for module in network.modules():
        for each in vars(module).values():
            if isinstance(each, Tensor) and not each.is_leaf:
                memo.setdefault(id(each), each.detach().clone())
    result = copy.deepcopy(network, memo)
    for parameter in result.parameters():
        if not parameter.is_leaf:  # TorchScript copies by an operation
            parameter.detach_().requires_grad_()
    return result


def twin(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a network in evaluation mode, without the hooks of its users.

    Args:
        network: Any network.
        memo: Copies that exist already, by the identity of their originals, as for ``copy.deepcopy``.

    Raises:
        ValueError: If the network is shared with its copies, as a ``FrozenTeacher`` is: probe its ``network``.
    """
    result = clone(network, memo)
    if result is network:
        raise ValueError(f"{type(network).__name__} is shared with its copies and cannot be probed; probe its network")
    for module in result.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):  # spectral_norm makes weights in a hook
                    del hooks[key]
        module.__dict__.pop(WATCH, None)
    return result.eval()


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
    memo: dict[int, Any] = {id(each): _on_meta(each) for each in (*network.parameters(), *network.buffers())}
    for module in network.modules():  # tensors that are neither parameters nor buffers
        memo |= {id(each): _on_meta(each) for each in vars(module).values() if isinstance(each, Tensor)}
    ghost = twin(network, memo)
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


def logits_of(output: Any, whose: str = "the network") -> Tensor:
    """Find the logits in what a network returns.

    Args:
        output: Tensor ``B x K``, ``B x K x 1 x 1``; an object or dict with ``logits``; a tuple or list of such tensors,
            whose mean is taken when they have equal shapes (as the two heads of a distilled DeiT).
        whose: Name of the network in the error message.

    Returns:
        Logits ``B x K``.

    Raises:
        ACKDError: If there are none.
    """
    found: Any = output
    if isinstance(found, dict):
        found = found["logits"] if "logits" in found else next(iter(found.values())) if len(found) == 1 else found
    elif hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, tuple | list) and found and all(isinstance(each, Tensor) for each in found):
        same = all(each.shape == found[0].shape for each in found)
        found = torch.stack(tuple(found)).mean(dim=0) if same and len(found) > 1 else found[0]
    if isinstance(found, Tensor) and found.dim() == 4 and found.shape[2:] == (1, 1):
        found = found.flatten(1)
    if isinstance(found, Tensor) and found.dim() == 2:
        return found
    if isinstance(found, Tensor):
        kind = f"a tensor of the shape {tuple(found.shape)}"
    else:
        kind = f"a {type(found).__name__}" + (f" with {', '.join(map(str, found))}" if isinstance(found, dict) else "")
    raise ACKDError(
        f"{whose} returns {kind}, and logits B x K are needed; return them alone, or as `logits` of a dict or an object"
    )


def tensors_in(output: Any) -> list[Tensor]:
    """Return every tensor in what a module returns.

    Args:
        output: Any nested tuples, lists, dicts and objects with tensors.
    """
    found = [each for each in pytree.tree_leaves(output) if isinstance(each, Tensor)]
    if not found and hasattr(output, "to_tuple"):
        found = [each for each in pytree.tree_leaves(output.to_tuple()) if isinstance(each, Tensor)]
    return found


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor with at least three dimensions, or else the first tensor, in what a module returns.

    Args:
        output: Any nested tuples, lists, dicts and objects with tensors.
    """
    found = tensors_in(output)
    return next((each for each in found if each.dim() >= 3), found[0] if found else None)


def as_map(output: Any, ratio: float, prefix: int | None = None) -> Tensor | None:
    """Read what a module returns as a feature map.

    Args:
        output: Map ``B x C x H x W`` or ``B x H x W x C``, or tokens ``B x N x C``, any class token first.
        ratio: Height of the image divided by its width.
        prefix: Number of the tokens in front; None for the smallest number that leaves a grid of the image's shape.

    Returns:
        ``B x C x H x W``; None for anything else.
    """
    tensor = first_tensor(output)
    if tensor is None or not tensor.is_floating_point():
        return None
    if tensor.dim() == 4:
        _, first, second, third = tensor.shape
        last = _fits(first, second, ratio)
        if _fits(second, third, ratio) and not (last and abs(first - second * ratio) < abs(second - third * ratio)):
            return tensor
        return tensor.permute(0, 3, 1, 2) if last else None
    if tensor.dim() == 3:
        count = tensor.shape[1]
        for skipped in range(min(count, 17)) if prefix is None else (prefix,):
            height = round(math.sqrt((count - skipped) * ratio))
            width = (count - skipped) // max(height, 1)
            if height * width == count - skipped > 0 and _fits(height, width, ratio):
                grid: Tensor = tensor[:, skipped:].transpose(1, 2)
                return grid.reshape(*grid.shape[:2], height, width)
    return None


def _fits(height: int, width: int, ratio: float) -> bool:
    """Whether a grid has the shape of the image, up to the rounding of strides."""
    return abs(height - width * ratio) <= max(1.0, ratio) * (0 if ratio == 1 else 1)


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
        classifier: Module that makes the logits; None if it is not known.
        pooled: Modules whose map, averaged over its positions, is the classifier's input.
        logits: Logits of the example.
    """

    logits: Tensor
    calls: dict[str, Call] = field(default_factory=dict)
    spine: list[Call] = field(default_factory=list)
    classifier: str | None = None
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


def _separate(nodes: frozenset[Any], output: Any, image: Any) -> bool:
    """Whether every path from the output to the image meets one of some nodes."""
    seen, stack = set(nodes), [output]
    while stack:
        node = stack.pop()
        if node is image:
            return False
        if node not in seen:
            seen.add(node)
            stack += [each for each, _ in node.next_functions if each is not None]
    return True


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
            shape = None if found is None else cast("tuple[int, int, int]", tuple(found.shape[1:]))
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
    result.classifier = next(
        (
            each.name
            for each in reversed(once)
            if logits.shape[1] in _outputs(modules[each.name]) and above.get(each.node, 0) * below.get(each.node, 0)
        ),
        None,
    )
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


def _outputs(module: nn.Module) -> tuple[int, ...]:
    """Widths of the output of a layer that can be a classifier."""
    return tuple(getattr(module, name, -1) for name in ("out_features", "out_channels") if hasattr(module, name))
