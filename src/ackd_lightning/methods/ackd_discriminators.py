"""Discriminators that tell auxiliary learners apart by their features (ACKD, Eq. 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DiscriminatorInput = Literal["map", "pooled"]


class Discriminators(nn.Module):
    """One stack of 1x1 convolutions with ReLU per learner: D_i says whether a feature comes from learner i.

    Widths C, C/2, C/4, 1; no normalisation, no ReLU on the logit (specs A25, A26, A29: the paper says only "a simple
    stack of 1x1 Conv with ReLU"). All learners' features go through all of them in one product for each layer.

    Args:
        count: M, number of learners.
        channels: C of the learners' feature maps.
        inputs: ``map`` looks at every position of the un-pooled map, ``pooled`` at its mean.
    """

    def __init__(self, count: int, channels: int, *, inputs: DiscriminatorInput = "map") -> None:
        super().__init__()
        self.inputs = inputs
        half, quarter = max(channels // 2, 1), max(channels // 4, 1)
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, half, 1),
                nn.ReLU(),
                nn.Conv2d(half, quarter, 1),
                nn.ReLU(),
                nn.Conv2d(quarter, 1, 1),
            )
            for _ in range(count)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Every discriminator's opinion of every learner's features.

        Args:
            features: M maps ``B x C x H x W`` of equal shape.

        Returns:
            ``M x M x N`` float32 logits: entry ``[i, j]`` is what D_i says of learner j's features, N = B·H·W.
        """
        maps = [F.adaptive_avg_pool2d(each, 1) for each in features] if self.inputs == "pooled" else list(features)
        rows = torch.cat(maps).permute(0, 2, 3, 1).flatten(0, 2)
        nets = [[each for each in net.modules() if isinstance(each, nn.Conv2d)] for net in self.nets]
        first, *others = zip(*nets, strict=True)
        weight = torch.cat([each.weight.flatten(1) for each in first])
        hidden = F.linear(rows, weight, torch.cat([each.bias for each in first]))  # all read the same maps
        hidden = hidden.view(len(rows), len(first), -1).transpose(0, 1)
        for layers in others:
            weight = torch.stack([each.weight.flatten(1).T for each in layers])
            bias = torch.stack([each.bias for each in layers])[:, None]
            hidden = torch.baddbmm(bias, F.relu(hidden), weight)
        return hidden.float().reshape(len(first), len(maps), -1)


def _own_and_others(table: Tensor) -> tuple[Tensor, Tensor]:
    """Means of an ``M x M`` table on and off its diagonal; no mask, which would make a GPU wait."""
    count = table.shape[0]
    diagonal = table.diagonal().sum()
    return diagonal / count, (table.sum() - diagonal) / (count * (count - 1))


def adversarial_value(logits: Tensor, *, flipped: bool = False) -> Tensor:
    r"""Value of the game, Eq. 4 and 5, from logits.

    \(L_{ad} = \frac1M \sum_i \frac1{M-1} \sum_{j \ne i} \mathbb{E}\log D_i(h_i) + \mathbb{E}\log(1 - D_i(h_j))\)

    Discriminators maximise it. Zero for one learner, for which Eq. 4 is not defined.

    Args:
        logits: ``M x M x N``; entry ``[i, j]`` is the logit of D_i for learner j.
        flipped: with the labels swapped, \(\log(1 - D_i(h_i)) + \log D_i(h_j)\); its negative is the
            non-saturating loss of the learners.

    Returns:
        Scalar float32 <= 0; \(-2\log 2\) when every D says one half.
    """
    count = logits.shape[0]
    if count < 2:
        return logits.sum() * 0.0
    sign = -1.0 if flipped else 1.0
    own, _ = _own_and_others(F.logsigmoid(sign * logits).mean(dim=2))
    _, others = _own_and_others(F.logsigmoid(-sign * logits).mean(dim=2))
    return own + others


def discriminator_accuracy(logits: Tensor) -> Tensor:
    """Share of right answers, own and other learners weighted equally; one half is guessing.

    Args:
        logits: ``M x M x N`` as in [`adversarial_value`][].

    Returns:
        Scalar in [0, 1].
    """
    own, others = _own_and_others((logits > 0).float().mean(dim=2))
    return 0.5 * (own + 1.0 - others)
