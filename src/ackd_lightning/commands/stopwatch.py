"""Rough duration of a training, from a few passes of its networks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

OVERHEAD = 1.3
"""Factor for data, method, optimizer and evaluation in addition to the networks; measured between 1.1 and 1.5."""
_PASSES, _IMAGES = 2, 8
"""Passes that are timed, and images of a pass at 32 x 32 on a CPU."""


class Stopwatch:
    """Times networks on this machine, every network once.

    Args:
        images: Images of a pass. None for 64 on a GPU, and for 2 to 8 on a CPU, fewer for larger images: quick to time,
            though each image then takes longer than in a whole batch.
        device: ``cuda`` or ``cpu``; None for what there is.
        channels_last: Whether the networks use this memory layout.
    """

    def __init__(self, images: int | None = None, *, device: str | None = None, channels_last: bool = False) -> None:
        self.images = images
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.known: dict[tuple[str, tuple[int, int, int], bool], float] = {}

    def seconds(
        self, make: Callable[[], torch.nn.Module], name: str, shape: tuple[int, int, int], *, train: bool
    ) -> float:
        """Seconds per image.

        Args:
            make: Function that builds the network, which returns a tensor or a ``NetOutput``.
            name: Name, equal for equal networks.
            shape: ``(C, H, W)`` of an image.
            train: Whether to include the backward pass.
        """
        key = (name, shape, train)
        if key not in self.known:
            few = max(2, min(_IMAGES, _IMAGES * 32**2 // (shape[1] * shape[2])))
            count = self.images or (64 if self.device.type == "cuda" else few)
            image = torch.randn(count, *shape, device=self.device).contiguous(memory_format=self.layout)
            network: torch.nn.Module = make().to(self.device, memory_format=self.layout).train(train)  # type: ignore[call-overload]
            times = []
            for _ in range(1 + _PASSES):  # the first is warm-up
                begin = time.perf_counter()
                with torch.set_grad_enabled(train):
                    output = network(image)
                    logits = output if isinstance(output, torch.Tensor) else output.logits
                    branches = [] if isinstance(output, torch.Tensor) else [each.logits for each in output.branches]
                    if train:
                        torch.stack([each.float().sum() for each in (logits, *branches)]).sum().backward()  # type: ignore[no-untyped-call]
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - begin) / count)
            self.known[key] = min(times[1:])  # other load makes a pass longer, never shorter
            del network, output, logits, branches
            gc.collect()  # a network whose stages are watched is part of a circle
        return self.known[key]


def rough(seconds: float) -> str:
    """Return a duration in its largest fitting unit.

    Args:
        seconds: Duration.

    Example:
        >>> rough(600)
        '10 min'
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
