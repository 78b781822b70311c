"""Discriminator of AI-KD and the losses that it and the student are trained with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    r"""Return the cross-entropy with soft targets, \(-\sum_k q_k \log p_k\), mean over the batch.

    Args:
        logits: Logits ``B x K``; gradients flow into them.
        probabilities: Targets ``B x K`` whose rows sum to 1; no gradient flows into them.

    Returns:
        Scalar float32, in nats.

    Examples:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.3, 0.7]]))  # log 2
        tensor(0.6931)
    """
    return -(probabilities.detach().float() * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    r"""Return \((\|\nabla_x D(x)\| - 1)^2\) between real and fake pairs, mean over the batch (Gulrajani et al. 2017).

    Gradients flow into the critic only.

    Args:
        critic: Function from ``B x K`` to ``B`` that treats every row separately.
        real: Real rows ``B x K``, float32.
        fake: Fake rows ``B x K``, float32.
        share: Share of the real row at the point where the slope is measured, ``B`` in [0, 1].

    Returns:
        Scalar float32.

    Examples:
        >>> critic = lambda x: 3 * x[:, 0]  # with a slope of 3
        >>> gradient_penalty(critic, torch.ones(2, 4), torch.zeros(2, 4), torch.tensor([0.2, 0.7])).item()
        4.0
    """
    between = torch.lerp(fake.detach(), real.detach(), share[:, None]).requires_grad_()
    with torch.autocast(between.device.type, enabled=False):  # it would also round the backward pass
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    excess: Tensor = torch.linalg.vector_norm(slope, dim=1) - 1
    return excess.square().mean()


class PredictionDiscriminator(nn.Module):
    """Discriminator of predictions: MLP K, hidden, hidden, 1 with LeakyReLU of slope 0.2.

    It computes in float32 also under mixed precision.

    Args:
        num_classes: Number K of classes.
        hidden: Width of both hidden layers.
    """

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(entering, leaving) for entering, leaving in ((num_classes, hidden), (hidden, hidden), (hidden, 1))
        )

    def forward(self, predictions: Tensor) -> Tensor:
        """Return logits, which are above 0 for the pretrained network.

        Args:
            predictions: Probabilities or logits ``B x K``.

        Returns:
            ``B`` float32.
        """
        first, *others = self.layers
        with torch.autocast(predictions.device.type, enabled=False):
            value = _linear(first, predictions.float())
            for layer in others:
                value = _linear(layer, F.leaky_relu(value, 0.2))
        return value[:, 0]


def _linear(layer: nn.Module, value: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return F.linear(value, layer.weight.float(), layer.bias.float())
