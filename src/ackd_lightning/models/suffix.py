"""The part of a network from one of its stages to the logits, as a network of its own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.models.copies import EXAMPLES, clone, dtype_of, in_evaluation, name_of, twin
from ackd_lightning.models.features import StagePlan, capture
from ackd_lightning.models.finding import probe, traced
from ackd_lightning.models.outputs import first_tensor, logits_of, same_logits
from ackd_lightning.models.tracing import Trace, parameters_behind
from ackd_lightning.types import ImageSize

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
        grows = self.first % EXAMPLES == 0  # the other ones are the same for all images
        shape = (self.first * batch // EXAMPLES if grows else self.first, *self.rest)
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
        example: Copy of the network, an image, and the calls that it made.

    Raises:
        ACKDError: If the network cannot be cut there.
    """

    def __init__(self, network: nn.Module, entry: str, example: tuple[nn.Module, Tensor, Trace]) -> None:
        super().__init__()
        ghost, image, record = example
        if entry not in record.calls or record.calls[entry] not in record.spine:
            raise ACKDError(f"data also flow past {entry!r}")
        given = record.calls[entry].value
        tensor = first_tensor(given)
        assert tensor is not None
        self.entry, self.image, self.each = entry, _Zeros(image), tensor.shape[0]
        # complete from the start: a compiled network is compiled again when a key is added
        self.memory: _Memory = {"dense": False, "batch": EXAMPLES, "device": image.device}
        self.network = _cut(network, ghost, entry, record, self.memory)
        memory: _Memory = {"dense": False}
        used = self._used(in_evaluation(_cut(ghost, ghost, entry, record, memory)), given, memory)
        for name, parameter in list(self.network.named_parameters()):
            if name not in used:  # as the class token of a transformer that is cut after its first block
                owner, _, own = name.rpartition(".")
                module = self.network.get_submodule(owner)
                delattr(module, own)
                module.register_buffer(own, parameter.detach(), persistent=False)

    def _used(self, ghost: nn.Module, given: Any, memory: _Memory) -> set[str]:
        """Return the names of the parameters that change the logits."""
        for parameter in ghost.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        given = pytree.tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, given)
        with torch.enable_grad():
            try:
                logits = self._run(ghost, given, memory)
            except RuntimeError:  # a sum in place cannot write to zeros that share one place in memory
                self.memory["dense"] = memory["dense"] = True
                logits = self._run(ghost, given, memory)
        return parameters_behind(ghost, [logits_of(logits).grad_fn])

    def _run(self, network: nn.Module, given: Any, memory: _Memory) -> Any:
        tensor = first_tensor(given)
        assert tensor is not None
        batch = tensor.shape[0] * EXAMPLES // self.each
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


def _cut(network: nn.Module, ghost: nn.Module, entry: str, record: Trace, memory: _Memory) -> nn.Module:
    """Copy a network without the entry, and without the outermost modules whose calls end before it."""
    end = record.calls[entry].end
    places: dict[int, Any] = {}  # deepcopy takes from its memo what it finds there

    def place(module: nn.Module, original: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            full, meant = f"{prefix}{name}", original.get_submodule(name)
            if full == entry:
                places[id(child)] = _Entry(meant, memory)
            elif full not in record.calls or entry.startswith(f"{full}."):
                place(child, meant, f"{full}.")
            elif record.calls[full].end < end:
                places[id(child)] = _Blank(meant, memory, record.calls[full].value)

    place(network, ghost, "")
    return clone(network, places)


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


class Cuts:
    """The places at which a network can be cut, found and proved by running it.

    Args:
        network: Network, with or without weights (meta device).
        plan: Stages of the network.
        input_size: Height and width of its images in pixels; None for the size that it was designed for.

    Raises:
        ACKDError: If the network cannot be run.
    """

    def __init__(self, network: nn.Module, plan: StagePlan, input_size: ImageSize | None = None) -> None:
        example = traced(network, input_size)
        if example is None:
            if input_size is not None:
                probe(network, input_size)  # states why, and a size that the network can read
            raise ACKDError(f"{name_of(network)} cannot be run on an example; check its forward")
        self.network, self.plan, self.example = network, plan, example
        self.ratio = example[1].shape[2] / example[1].shape[3]
        self._whole: tuple[nn.Module, Tensor, dict[str, Any]] | None = None

    @property
    def has_weights(self) -> bool:
        """Whether the network has weights, by which its parts can be compared with it."""
        return not any(each.is_meta for each in itertools.chain(self.network.parameters(), self.network.buffers()))

    def suffix(self, entry: str) -> Suffix:
        """Return the part of the network after a module.

        Args:
            entry: Name of the module.

        Raises:
            ACKDError: If the network cannot be cut there.
        """
        return Suffix(self.network, entry, self.example)

    @torch.no_grad()
    def difference(self, entry: str) -> str | None:
        """Compare the network with its part up to a module followed by its part after it, on three random images.

        A copy in evaluation mode with other norms and biases is compared. Weights, modes and torch's random numbers
        stay as they are.

        Args:
            entry: Name of the module.

        Returns:
            Why the two differ; None if they are equal up to rounding, or the network has no weights.
        """
        if not self.has_weights:
            return None
        try:
            with torch.random.fork_rng(devices=[]):
                whole, own, values = self._run_whole()
                found = logits_of(Suffix(whole, entry, self.example).eval()(values[entry])).float()
        except ACKDError as error:
            return str(error)
        except Exception as error:  # anything may happen in a part of a network
            return first_line(error, 300)
        if same_logits(found, own, dtype_of(whole)):
            return None
        return f"with the same weights its logits differ by up to {float((found - own).abs().max()):.3g}"

    def _run_whole(self) -> tuple[nn.Module, Tensor, dict[str, Any]]:
        """Return the copy, its logits, and what its stages return."""
        if self._whole is None:
            whole, generator = twin(self.network), torch.Generator().manual_seed(0)
            _disturb(whole, generator)
            place = next((each.device for each in whole.parameters()), torch.device("cpu"))
            image = torch.randn(3, *self.example[1].shape[1:], generator=generator, device="cpu")
            output, _, _, values = capture(whole, self.plan, image.to(place, dtype_of(whole)), self.ratio)
            self._whole = whole, logits_of(output).float(), values
        return self._whole
