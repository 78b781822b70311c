from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ackd_lightning.types import Batch, NetOutput, NetSpec

CLASSES, CHANNELS, SIDE, IMAGES = 5, 8, 2, 4


class Scene:
    """Leaf tensors in the place of a student's and a teacher's output, so that every gradient can be read."""

    def __init__(self, learners: int) -> None:
        generator = torch.Generator().manual_seed(learners)

        def leaf(*shape: int) -> torch.Tensor:
            return (2 * torch.randn(*shape, generator=generator)).requires_grad_()

        self.z_s, self.z_t = leaf(IMAGES, CLASSES), leaf(IMAGES, CLASSES)
        self.z = [leaf(IMAGES, CLASSES) for _ in range(learners)]
        self.h = [leaf(IMAGES, CHANNELS, SIDE, SIDE) for _ in range(learners)]
        self.h_s = leaf(IMAGES, CHANNELS, SIDE, SIDE)
        branches = tuple(NetOutput(z, (h,), h.mean(dim=(2, 3))) for z, h in zip(self.z, self.h, strict=True))
        self.student = NetOutput(self.z_s, (self.h_s,), self.h_s.mean(dim=(2, 3)), branches)
        self.teacher = NetOutput(self.z_t)
        self.batch = Batch(torch.zeros(IMAGES, 3, 4, 4), torch.tensor([0, 4, 2, 2]), torch.arange(IMAGES))
        branch = NetSpec(CLASSES, ((CHANNELS, SIDE, SIDE),), CHANNELS)
        self.spec = NetSpec(CLASSES, ((CHANNELS, SIDE, SIDE),), CHANNELS, (branch,) * learners)

    def gradients(self, value: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Gradient of a value by name of the leaf; None where nothing flows."""
        leaves = {"z_s": self.z_s, "z_t": self.z_t, "h_s": self.h_s}
        leaves |= {f"z_{number}": each for number, each in enumerate(self.z)}
        leaves |= {f"h_{number}": each for number, each in enumerate(self.h)}
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, retain_graph=True)
        return dict(zip(leaves, found, strict=True))


@pytest.fixture
def scene() -> Callable[[int], Scene]:
    return Scene
