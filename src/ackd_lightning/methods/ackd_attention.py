"""Attention over auxiliary learners (ACKD, Eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ackd_lightning.models.features import pooled

AttentionInput = Literal["pooled", "flattened", "scaled"]


class _Pooled(torch.autograd.Function):
    """Mean of a map over its positions, whose gradient is a view.

    The usual gradient is a map of its own, in another layout than channels last. It is added to that of the
    discriminators, which then takes longer than everything else here.
    """

    @staticmethod
    def forward(ctx: Any, feature: Tensor) -> Tensor:
        ctx.shape = feature.shape
        return pooled(feature)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        *_, height, width = ctx.shape
        each: Tensor = gradient / (height * width)
        return each[:, :, None, None].expand(ctx.shape)


class LearnerAttention(nn.Module):
    r"""Attention that weighs M learners for every image.

    \(x = g(\mathrm{Concat}(h^{(1)}, …)),\ a = \mathrm{softmax}(\mathrm{MLP}(x))\).

    Args:
        shapes: Shape ``(C, H, W)`` of each learner's feature map.
        inputs: Function g. ``flattened`` is the paper's, ``pooled`` averages over H and W first, and ``scaled`` divides
            the flattened map by H·W, so that x is as large as with pooling.
        hidden: Width of the hidden layer of the MLP (not in the paper).

    Note:
        In a first measurement the flattened input at the student's learning rate put all weight on one learner
        within an epoch; see ``val/attention_entropy`` in the log.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int, int]], *, inputs: AttentionInput = "pooled", hidden: int = 128
    ) -> None:
        super().__init__()
        self.inputs = inputs
        width = sum(C if inputs == "pooled" else C * H * W for C, H, W in shapes)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, len(shapes)))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the attention weight of every learner for every image.

        Args:
            features: Feature map ``B x C x H x W`` of each of the M learners; gradients flow into them.

        Returns:
            ``B x M`` float32 whose rows sum to 1.

        Examples:
            >>> attention = LearnerAttention([(4, 2, 2)] * 2)
            >>> attention([torch.ones(3, 4, 2, 2)] * 2).sum(dim=1).detach().round(decimals=4)
            tensor([1., 1., 1.])
        """
        if self.inputs == "pooled":
            joined = torch.cat([_Pooled.apply(feature) for feature in features], dim=1)
        else:
            scale = 1.0 if self.inputs == "flattened" else 1.0 / features[0][0, 0].numel()
            joined = torch.cat([feature.flatten(1) * scale for feature in features], dim=1)
        weights: Tensor = self.mlp(joined).float().softmax(dim=1)
        return weights
