"""Size, multiply-adds, latency and throughput of networks and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.latency import BATCHES, Latency
from ackd_lightning.deploy.latency import measure as measure_latency
from ackd_lightning.models.zoo.complexity import count_parameters, multiply_adds


@dataclass
class Cost:
    """What one network or file costs.

    Attributes:
        name: Name of the row.
        parameters: Number of parameters; None where a file does not say.
        multiply_adds: Multiply-adds for one image; None where they cannot be counted.
        bytes: Size of the file, or of the weights in memory.
        latency: Measurements on this machine, one for each batch size.
        right: Number of test images that a file classifies correctly, of those that it was asked about.
        asked: Number of those images.
        note: Why something is missing.
    """

    name: str
    parameters: int | None = None
    multiply_adds: int | None = None
    bytes: int | None = None
    latency: tuple[Latency, ...] = ()
    right: int | None = None
    asked: int | None = None
    note: str = ""


def of_module(name: str, network: nn.Module, shape: tuple[int, int, int]) -> Cost:
    """Count a network in memory.

    Args:
        name: Name of the row.
        network: Network that maps normalised images to logits.
        shape: Channels, height and width of its images.
    """
    try:
        adds: int | None = multiply_adds(network, (shape[1], shape[2]), shape[0])
    except (RuntimeError, NotImplementedError):  # an operator that the meta device does not have
        adds = None
    weights = sum(each.numel() * each.element_size() for each in network.state_dict().values())
    return Cost(name, count_parameters(network), adds, weights)


def latencies(
    run: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    *,
    largest: int | None = None,
    device: torch.device | str = "cpu",
    seconds: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Latency]:
    """Measure a network at each batch size of a report.

    Args:
        run: Function from images, as the network reads them, to logits.
        shape: Channels, height and width of an image.
        largest: Largest batch that it takes; None for any.
        device: Device of the images.
        seconds: Shortest time of each measurement.
        dtype: Type of the images.
    """
    for batch in BATCHES:
        if largest is None or batch <= largest:
            yield measure_latency(run, shape, batch=batch, seconds=seconds, device=device, dtype=dtype)
