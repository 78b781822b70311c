"""Discriminators that tell auxiliary learners apart by their features (ACKD, Eq. 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DiscriminatorInput = Literal["map", "pooled"]


class Discriminators(nn.Module):
    """One stack of 1x1 convolutions with ReLU per learner; D_i tells whether a feature comes from learner i.

    The paper only mentions "a simple stack of 1x1 Conv with ReLU". Here the widths are C, C/2, C/4 and 1, with no
    normalisation and no ReLU on the logit. One matrix product per layer evaluates all of them on all learners.

    Args:
        count: Number M of learners.
        channels: Channels C of the learners' feature maps.
        inputs: Features that are read: every position of the ``map``, or its mean (``pooled``).
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

    def forward(self, features: Sequence[Tensor], *, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """Return the adversarial value and the accuracy of the discriminators; one compiled network computes both.

        Args:
            features: Feature map ``B x C x H x W`` of each of the M learners.
            flipped: Whether the labels are swapped, as in [`adversarial_value`][].

        Returns:
            Two scalars, float32; the second has no gradient.
        """
        logits = self.logits(features)
        return adversarial_value(logits, flipped=flipped), discriminator_accuracy(logits.detach())

    def logits(self, features: Sequence[Tensor]) -> Tensor:
        """Return the logits of all discriminators for the features of all learners.

        Args:
            features: Feature map ``B x C x H x W`` of each of the M learners.

        Returns:
            ``M x M x N`` float32 logits with N = B·H·W; entry ``[i, j]`` is D_i on the features of learner j.
        """
        maps = [F.adaptive_avg_pool2d(each, 1) for each in features] if self.inputs == "pooled" else list(features)
        rows = torch.cat(maps).permute(0, 2, 3, 1).flatten(0, 2)
        nets = [[each for each in net.modules() if isinstance(each, nn.Conv2d)] for net in self.nets]
        for layer in (layer for net in nets for layer in net):
            for hook in layer._forward_pre_hooks.values():
                if type(hook).__module__.startswith("torch.nn.utils"):  # pruning computes the weight in a hook
                    hook(layer, ())
        first, *others = zip(*nets, strict=True)
        weight = torch.cat([each.weight.flatten(1) for each in first])
        hidden = F.linear(rows, weight, torch.cat([each.bias for each in first]))  # all read the same maps
        hidden = hidden.view(len(rows), len(first), -1).transpose(0, 1)
        for layers in others:
            weight = torch.stack([each.weight.flatten(1).T for each in layers])
            bias = torch.stack([each.bias for each in layers])[:, None]
            hidden = torch.baddbmm(bias, _relu(hidden, trained=weight.requires_grad), weight)
        return hidden.float().reshape(len(first), len(maps), -1)


def _relu(hidden: Tensor, *, trained: bool) -> Tensor:
    """ReLU for layers that are trained or frozen.

    The gradient of frozen layers needs the signs alone. Torch's compiler would keep them as booleans, which it writes
    one by one on a CPU; as numbers they take a tenth of the time.
    """
    if trained or not torch.compiler.is_compiling():
        return F.relu(hidden)
    return hidden * hidden.detach().sign().clamp_min(0)


def _own_and_others(table: Tensor) -> tuple[Tensor, Tensor]:
    """Means of an ``M x M`` table on and off its diagonal; no mask, which would make a GPU wait."""
    count = table.shape[0]
    diagonal = table.diagonal().sum()
    return diagonal / count, (table.sum() - diagonal) / (count * (count - 1))


def adversarial_value(logits: Tensor, *, flipped: bool = False) -> Tensor:
    r"""Return the adversarial value of Eq. 4 and 5.

    \(L_{ad} = \frac1M \sum_i \frac1{M-1} \sum_{j \ne i} \mathbb{E}\log D_i(h_i) + \mathbb{E}\log(1 - D_i(h_j))\)

    Discriminators maximise it. Zero for one learner, for which Eq. 4 is not defined.

    Args:
        logits: Logits ``M x M x N``; entry ``[i, j]`` is D_i on the features of learner j.
        flipped: Whether the labels are swapped, \(\log(1 - D_i(h_i)) + \log D_i(h_j)\). The negative is the
            non-saturating loss of the learners.

    Returns:
        Scalar float32 <= 0; \(-2\log 2\) when every probability is one half.

    Examples:
        >>> adversarial_value(torch.zeros(2, 2, 8))  # -2 log 2
        tensor(-1.3863)
    """
    count = logits.shape[0]
    if count < 2:
        return logits.sum() * 0.0
    sign = -1.0 if flipped else 1.0
    own, _ = _own_and_others(F.logsigmoid(sign * logits).mean(dim=2))
    _, others = _own_and_others(F.logsigmoid(-sign * logits).mean(dim=2))
    return own + others


def discriminator_accuracy(logits: Tensor) -> Tensor:
    """Return the accuracy with own and other learners weighted equally; one half is chance.

    Args:
        logits: Logits ``M x M x N`` as in `adversarial_value`.

    Returns:
        Scalar in [0, 1].
    """
    own, others = _own_and_others((logits > 0).float().mean(dim=2))
    return 0.5 * (own + 1.0 - others)
