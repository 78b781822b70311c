"""The part of a network from one of its stages to the logits, as a network of its own."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import StagePlan, capture
from ackd_lightning.models.tracing import (
    Trace,
    dtype_of,
    first_tensor,
    image_channels,
    logits_of,
    skeleton,
    trace,
    twin,
)
from ackd_lightning.types import ImageSize, height_width

_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that is put down to rounding (float32)."""

_Memory = dict[str, Any]


class _Place(nn.Module):
    """Place of a module that is not run.

    Args:
        original: The module on the meta device, for a forward that asks it for something else than its output.
        memory: What the suffix was given.
    """

    def __init__(self, original: nn.Module, memory: _Memory) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a sub-module: it has no weights
        self.memory = memory

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.__dict__["original"], name)


class _Entry(_Place):
    """Place of the module whose output a suffix reads."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the suffix was given."""
        return self.memory["given"]


class _Zeros:
    """Shape of a tensor whose first dimension grows with the batch; two images were in the example."""

    def __init__(self, tensor: Tensor) -> None:
        self.first, self.rest, self.dtype = tensor.shape[0], tuple(tensor.shape[1:]), tensor.dtype

    def make(self, batch: int, device: torch.device, dense: bool) -> Tensor:
        shape = (self.first * batch // 2, *self.rest)
        zeros = torch.zeros(shape if dense else (1,), dtype=self.dtype, device=device)
        return zeros.expand(shape)


class _Blank(_Place):
    """Place of a module before the entry, which returns zeros of the shapes that the module returned.

    They are discarded at the entry, and only let the network's own forward arrive there.
    """

    def __init__(self, original: nn.Module, memory: _Memory, output: Any) -> None:
        super().__init__(original, memory)
        self.output = pytree.tree_map(lambda each: _Zeros(each) if isinstance(each, Tensor) else each, output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros for the batch that the suffix was given."""
        batch, device, dense = (self.memory[name] for name in ("batch", "device", "dense"))
        return pytree.tree_map(
            lambda each: each.make(batch, device, dense) if isinstance(each, _Zeros) else each, self.output
        )


class Suffix(nn.Module):
    """Copy of a network from the output of one of its modules to the logits.

    The network's own forward is run; modules before the entry are replaced by zeros, which cost next to nothing.

    Args:
        network: Network whose structure and weights are copied.
        entry: Name of the module whose output is read.
        input_size: Height and width in pixels of the images of the network.

    Raises:
        ACKDError: If the network cannot be cut there.
    """

    def __init__(self, network: nn.Module, entry: str, input_size: ImageSize) -> None:
        super().__init__()
        ghost, image = skeleton(network, input_size)
        image = image.expand(2, *image.shape[1:]).clone()
        try:
            record = trace(ghost, image)
        except Exception:  # real numbers may be what it needs
            ghost, image = twin(network), torch.zeros(image.shape, dtype=image.dtype)
            record = trace(ghost, image)
        if entry not in record.calls or record.calls[entry] not in record.spine:
            raise ACKDError(f"data also flow past {entry!r}")
        self.entry = entry
        self.memory: _Memory = {"dense": False}
        self.network = copy.deepcopy(network)
        given = record.calls[entry].value
        tensor = first_tensor(given)
        assert tensor is not None
        self.each = tensor.shape[0]
        self.image = _Zeros(image)
        originals = dict(ghost.named_modules(remove_duplicate=False))
        _cut(self.network, "", entry, record, originals, self.memory)
        _cut(ghost, "", entry, record, originals, memory := {"dense": False})
        used = self._used(ghost, given, memory)
        for name, parameter in list(self.network.named_parameters()):
            if name not in used:  # as the class token of a transformer that is cut after its first block
                owner, _, own = name.rpartition(".")
                module = self.network.get_submodule(owner)
                delattr(module, own)
                module.register_buffer(own, parameter.detach(), persistent=False)

    def _used(self, ghost: nn.Module, given: Any, memory: _Memory) -> set[str]:
        """Return the names of the parameters that change the logits."""
        names = {}
        for name, parameter in ghost.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            names[id(parameter)] = name
        given = pytree.tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, given)
        with torch.enable_grad():
            try:
                logits = self._run(ghost, given, memory)
            except RuntimeError:  # a sum in place cannot write to zeros that share one place in memory
                self.memory["dense"] = memory["dense"] = True
                logits = self._run(ghost, given, memory)
        seen, stack, found = set[Any](), [logits_of(logits).grad_fn], set[str]()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in names:
                found.add(names[id(variable)])
            stack += [each for each, _ in node.next_functions]
        return found

    def _run(self, network: nn.Module, given: Any, memory: _Memory) -> Any:
        tensor = first_tensor(given)
        assert tensor is not None
        batch = tensor.shape[0] * 2 // self.each
        memory.update(given=given, batch=batch, device=tensor.device)
        try:
            return network(self.image.make(batch, tensor.device, memory["dense"]))
        finally:
            del memory["given"]

    def forward(self, given: Any) -> Any:
        """Return what the network returns.

        Args:
            given: Output of the entry module.
        """
        return self._run(self.network, given, self.memory)


def _cut(
    module: nn.Module, prefix: str, entry: str, record: Trace, originals: dict[str, nn.Module], memory: _Memory
) -> None:
    """Replace the entry, and the outermost modules whose calls end before it."""
    end = record.calls[entry].end
    for name, child in list(module._modules.items()):
        full = f"{prefix}{name}"
        if child is None:
            continue
        if full == entry:
            module._modules[name] = _Entry(originals[full], memory)
        elif full in record.calls and not entry.startswith(f"{full}."):
            if record.calls[full].end < end:
                module._modules[name] = _Blank(originals[full], memory, record.calls[full].value)
        else:
            _cut(child, f"{full}.", entry, record, originals, memory)


def _disturb(network: nn.Module, generator: torch.Generator) -> None:
    """Change norms, biases and running statistics, because fresh ones hide what is forgotten."""
    for module in network.modules():
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is None or not tensor.is_floating_point() or not tensor.numel():
                continue
            if tensor.dim() != 1 and bool((tensor != tensor.flatten()[0]).any()):
                continue  # random weights; constant ones, such as a layer scale, are changed
            if name in module._buffers and name not in ("running_mean", "running_var"):
                continue
            factor, shift = torch.rand(2, *tensor.shape, generator=generator, device="cpu").to(tensor)
            tensor.mul_(0.5 + factor)
            if name != "running_var":
                tensor.add_(0.2 * (shift - 0.5))


@torch.no_grad()
def difference(network: nn.Module, plan: StagePlan, entry: str, input_size: ImageSize) -> str | None:
    """Compare a network with its stem and stages up to an entry followed by the suffix, on three random images.

    The copy that is compared is in evaluation mode and has other norms and biases. Weights, modes and torch's random
    numbers stay as they are.

    Args:
        network: Network with weights.
        plan: Stages of the network.
        entry: Name of the module after which the suffix begins.
        input_size: Height and width of the images in pixels.

    Returns:
        Why the two differ; None if they are equal up to rounding, or the network has no weights (meta device).
    """
    if any(each.is_meta for each in itertools.chain(network.parameters(), network.buffers())):
        return None
    whole, generator = twin(network), torch.Generator().manual_seed(0)
    _disturb(whole, generator)
    place = next((each.device for each in network.parameters()), torch.device("cpu"))
    height, width = height_width(input_size)
    shape = (3, image_channels(network), height, width)
    image = torch.randn(shape, generator=generator, device="cpu").to(place, dtype_of(network))
    try:
        with torch.random.fork_rng(devices=[]):
            suffix = Suffix(whole, entry, input_size).eval()
            output, _, _, values = capture(whole, plan, image, height / width)
            own, found = logits_of(output).float(), logits_of(suffix(values[entry])).float()
    except ACKDError as error:
        return str(error)
    except Exception as error:  # anything may happen in a part of a network
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    allowed = max(_TOLERANCE, 8 * torch.finfo(image.dtype).eps) * float(own.abs().nan_to_num(0.0, posinf=0.0).max())
    if torch.allclose(found, own, rtol=0.0, atol=allowed, equal_nan=True):
        return None
    return f"with the same weights its logits differ by up to {float((found - own).abs().max()):.3g}"
