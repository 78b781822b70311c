"""One stage of a frozen network, which another network can run in the place of its own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ackd_lightning.models.suffix import Cuts


class _Done(Exception):  # noqa: N818  # no error: it ends a forward pass early
    """The output of a stage, after which nothing has to run."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _stop(module: Any, args: Any, value: Tensor) -> None:
    raise _Done(value)


class SingleStage:
    """One stage of a network, frozen, in evaluation mode and in float32.

    It shares the network's weights as they are in the first call, layout and device included. Weights of another type
    are copied. Modules after the stage have no weights here.

    Args:
        cuts: Places at which the network can be cut.
        number: Number of the stage, from 1.

    Raises:
        ACKDError: If the network cannot be cut there.
    """

    def __init__(self, cuts: Cuts, number: int) -> None:
        calls = cuts.example[2].calls
        entry, end = (cuts.plan.features[each] for each in (number - 1, number))
        self.part = cuts.suffix(entry).eval().requires_grad_(False)
        network = self.part.network
        network.get_submodule(end).register_forward_hook(_stop)
        later = tuple(name for name, call in calls.items() if call.start > calls[end].end)
        prefixes = tuple(f"{name}." for name in later)
        needed = {
            module
            for name, module in network.named_modules(remove_duplicate=False)  # one module may have several places
            if name not in later and not name.startswith(prefixes)
        }
        for name in later:
            for module in network.get_submodule(name).modules():
                if module not in needed:
                    module.to_empty(device="meta", recurse=False)
        known = {
            **dict(cuts.network.named_parameters(remove_duplicate=False)),
            **dict(cuts.network.named_buffers(remove_duplicate=False)),
        }
        self._tensors = [
            (own, known[name])
            for name, own in itertools.chain(network.named_parameters(), network.named_buffers())
            if not own.is_meta
        ]
        self._take(None)
        self.device: torch.device | None = None  # the network may be moved or laid out before the first call

    def _take(self, device: torch.device | None) -> None:
        """Share the network's tensors, where they are float32 and on the device."""
        for own, source in self._tensors:
            own.data = source.detach().to(device, torch.float32 if source.is_floating_point() else source.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> SingleStage:
        return self  # it never changes

    def __call__(self, feature: Tensor) -> Tensor:
        """Return the stage's output, in the type of the feature but for autocast; gradients flow into the feature.

        Args:
            feature: Output of the stage before, ``B x C x H x W``.
        """
        mixed = torch.is_autocast_enabled(feature.device.type)  # otherwise the student may be of another type
        if feature.device != self.device:
            self._take(feature.device)
            self.device = feature.device
        try:
            self.part(feature if mixed else feature.float())
        except _Done as done:
            return done.value if mixed else done.value.to(feature.dtype)
        raise AssertionError("the stage was not run")
