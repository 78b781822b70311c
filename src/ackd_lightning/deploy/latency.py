"""Latency and throughput of a network on this machine."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BATCHES = (1, 32)
"""Batch sizes at which a report measures."""
PTE_THREADS = "A .pte file runs with as many threads as ExecuTorch chooses."
_WARM_UP, _FEWEST, _MOST = 3, 10, 1000


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
    dtype: torch.dtype = torch.float32,
) -> Latency:
    """Time a network on random images, pass by pass, after passes that are not counted.

    The number of threads is that of `torch.get_num_threads`. On a GPU the clock stops when the device has finished.

    Args:
        network: Function that maps images ``B x C x H x W`` to logits; gradients are off while it runs.
        shape: Channels, height and width of an image.
        batch: Number B of images.
        seconds: Time to measure for; at least 10 and at most 1,000 passes are timed.
        device: Device of the images.
        dtype: Type of the images; uint8 for a network that reads pixels.

    Examples:
        >>> result = measure(lambda image: image.mean(dim=(2, 3)), (3, 8, 8), batch=4, seconds=0.01)
        >>> result.batch, result.median > 0, result.passes > 1
        (4, True, True)
    """
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.uint8:
        image = torch.randint(0, 256, (batch, *shape), generator=generator, dtype=dtype).to(device)
    else:
        image = torch.randn(batch, *shape, generator=generator).to(device, dtype)

    def once() -> None:
        network(image)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)

    clock = timeit.Timer(once)
    with torch.inference_mode():
        clock.timeit(_WARM_UP)  # what a runtime compiles, allocates or chooses in its first passes
        passes = max(_FEWEST, min(_MOST, round(seconds / max(clock.timeit(1), 1e-6))))
        times = np.array(clock.repeat(passes, number=1))
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
    return Latency(batch, torch.get_num_threads(), image.device.type, median, high - low, passes)
