"""Slow references and a network that tests of several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ackd_lightning.models.features import StagePlan


def softened(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(each / temperature) for each in row]
    return [each / sum(powers) for each in powers]


def slow_divergences(source: Tensor, learner: Tensor, temperature: float) -> list[float]:
    """Return tau^2 KL(source || learner) of every image."""
    found = []
    for z_t, z_s in zip(source.double().tolist(), learner.double().tolist(), strict=True):
        pairs = zip(softened(z_t, temperature), softened(z_s, temperature), strict=True)
        found.append(temperature**2 * sum(t * math.log(t / s) for t, s in pairs))
    return found


def slow_divergence(source: Tensor, learner: Tensor, temperature: float) -> float:
    """Return the mean over the images of tau^2 KL(source || learner)."""
    found = slow_divergences(source, learner, temperature)
    return sum(found) / len(found)


def extreme(dtype: torch.dtype, *, sign: int = 1, images: int = 8, classes: int = 5) -> Tensor:
    """Return logits close to the largest number of half precision, with gradient; all images are sure of class 1."""
    logits = torch.full((images, classes), -6e4 * sign, dtype=dtype)
    logits[:, 1] = 6e4 * sign
    return logits.requires_grad_()


def check_finite(loss: Tensor, *leaves: Tensor) -> None:
    """Check that a loss is a finite float32 with finite gradients of some tensors."""
    loss.backward()
    assert loss.dtype is torch.float32
    assert loss.isfinite()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def twenty_steps(loss: Callable[[], Tensor], leaves: Iterable[Tensor], *, lr: float) -> list[float]:
    """Return a loss before each of 20 steps of SGD and after the last."""
    optimizer = torch.optim.SGD(leaves, lr=lr)
    losses = []
    for _ in range(20):
        value = loss()
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return [*losses, loss().item()]


class Stages(nn.Module):
    """A network whose stages a test can run one by one."""

    stage_plan = StagePlan(("stem", "first", "second"), "head")

    def __init__(self, widths: tuple[int, int, int] = (4, 8, 6), *, stride: int = 2) -> None:
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.stem, self.first = stage(3, widths[0], 1), stage(widths[0], widths[1], stride)
        self.second, self.head = stage(widths[1], widths[2], stride), nn.Linear(widths[2], 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(image))).mean(dim=(2, 3)))
