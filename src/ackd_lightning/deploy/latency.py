"""Latency and throughput of a network on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

BATCHES = (1, 32)
"""Batch sizes at which a report measures."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Time of one forward pass.

    Attributes:
        batch: Number of images.
        threads: Number of CPU threads that torch may use.
        device: Where the images are: ``cpu`` or ``cuda``.
        median: Median in seconds.
        spread: Interquartile range in seconds: half of the measurements differ by at most as much.
        passes: Number of timed forward passes.
    """

    batch: int
    threads: int
    device: str
    median: float
    spread: float
    passes: int

    @property
    def throughput(self) -> float:
        """Images per second at the median."""
        return self.batch / self.median


def measure(
    network: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    *,
    batch: int = 1,
    seconds: float = 0.5,
    device: str | torch.device = "cpu",
) -> Latency:
    """Time a network on random images by `torch.utils.benchmark`, after passes that are not counted.

    The number of threads is that of `torch.get_num_threads`. On a GPU the clock stops when the device has finished.

    Args:
        network: Function that maps images ``B x C x H x W`` to logits; gradients are off while it runs.
        shape: Channels, height and width of an image.
        batch: Number B of images.
        seconds: Shortest time to measure for.
        device: Device of the images.

    Example:
        >>> result = measure(lambda image: image.mean(dim=(2, 3)), (3, 8, 8), batch=4, seconds=0.01)
        >>> result.batch, result.median > 0, result.passes > 1
        (4, True, True)
    """
    image = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        for _ in range(3):  # what a runtime compiles, allocates or chooses in its first passes
            network(image)
        timer = Timer("network(image)", globals={"network": network, "image": image}, num_threads=threads)
        found = timer.blocked_autorange(min_run_time=seconds)
    passes = len(found.raw_times) * found.number_per_run
    return Latency(batch, threads, image.device.type, found.median, found.iqr, passes)
