"""Negatives for contrastive methods: training images of other classes, drawn with stateless random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.random import stateless_bits


class NegativeSampler(nn.Module):
    """Sampler that draws images of other classes with replacement, each with the same probability.

    A draw depends only on (stream, seed, step, image, position), not on the device, the number of processes or the rest
    of the batch. The sampler is a module so that it can be compiled, which makes it about ten times as fast and changes
    no draw.

    Args:
        count: Number K of negatives for every image.
        stream: Number that separates these draws from other random numbers.
    """

    TABLES = ("targets", "by_class", "class_start", "class_count")
    """Buffers, equal in all processes and in no checkpoint."""
    targets: Tensor
    by_class: Tensor
    class_start: Tensor
    class_count: Tensor

    def __init__(self, count: int, *, stream: int) -> None:
        super().__init__()
        self.count, self.stream, self.seed = count, stream, 0
        for name in self.TABLES:
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)

    def set_targets(self, targets: Tensor, seed: int) -> None:
        """Create the tables of the classes.

        Args:
            targets: Class of every training image by its index, ``N`` int64.
            seed: Seed of the draws.

        Raises:
            ACKDError: If all images belong to one class, which has no negatives.
        """
        device, self.seed = self.targets.device, seed
        targets = targets.to("cpu", torch.int64)
        counts = torch.bincount(targets)
        if int((counts > 0).sum()) < 2:
            raise ACKDError(
                f"all {len(targets)} training images belong to one class, and the method contrasts images of different "
                "classes; train on two classes or more"
            )
        self.targets, self.class_count = targets.to(device), counts.to(device)
        self.by_class = targets.argsort(stable=True).to(device)
        self.class_start = (counts.cumsum(0) - counts).to(device)

    def forward(self, index: Tensor, target: Tensor, step: Tensor) -> Tensor:
        """Return the negatives of every image in this step.

        Args:
            index: Indices of the images, ``B`` int64.
            target: Classes of the images, ``B`` int64.
            step: Number of the step, int64 scalar.

        Returns:
            ``B x K`` int64 indices.
        """
        position = torch.arange(self.count, device=index.device)
        bits = stateless_bits(self.stream, self.seed, step, index[:, None], position[None, :])
        own = self.class_count[target][:, None]
        place = ((bits >> 31) * (len(self.by_class) - own)) >> 32  # 32 random bits times the choices, without bias
        place = place + own * (place >= self.class_start[target][:, None])  # skip the image's own class
        return self.by_class[place]
