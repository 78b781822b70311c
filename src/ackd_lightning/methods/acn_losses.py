"""Divergence and disagreement of several classifiers (for ACN)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.functional import mean_log_probability


def js_divergence(logits: Sequence[Tensor]) -> Tensor:
    r"""Return the Jensen-Shannon divergence of n classifiers' predictions, J of the equations.

    It is computed as \(\frac1n \sum_i \mathrm{KL}(p_i \| \bar p)\), which is equal and exact near 0. Gradients flow
    into all logits.

    Args:
        logits: Logits ``B x K`` of each of n classifiers.

    Returns:
        ``B`` float32 from 0 to log n, in nats.

    Examples:
        >>> js_divergence([torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]])])  # log 2
        tensor([0.6931])
    """
    every = torch.stack([F.log_softmax(each.float(), dim=1) for each in logits])
    ratio = every - mean_log_probability(logits)
    return (every.exp() * ratio).sum(dim=2).mean(dim=0)


def disagreement(logits: Sequence[Tensor]) -> Tensor:
    """Return the share of images for which the predicted classes of the classifiers differ.

    Args:
        logits: Logits ``B x K`` of each of n classifiers.

    Returns:
        Scalar in [0, 1].
    """
    answers = torch.stack([each.argmax(dim=1) for each in logits])
    return (answers != answers[0]).any(dim=0).float().mean()
