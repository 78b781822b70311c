"""Mutual distillation, divergence and disagreement of several classifiers (for ACN)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.functional import kd_loss
from ackd_lightning.types import NetOutput


def mutual_loss(logits: Sequence[Tensor], *, temperature: float) -> Tensor:
    r"""Return the distillation among n classifiers, M of the equations.

    \(\sum_i \frac{\tau^2}{n - 1} \sum_{j \ne i} \mathrm{KL}(p_j \| p_i)\), mean over the batch; no gradient flows into
    the \(p_j\).

    Args:
        logits: Logits ``B x K`` of each of n >= 2 classifiers.
        temperature: Temperature tau, above 0.

    Returns:
        Scalar float32, in nats.

    Example:
        >>> mutual_loss([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])], temperature=1.0)
        tensor(0.7616)
    """
    pairs = [
        kd_loss(own, other, temperature=temperature)
        for i, own in enumerate(logits)
        for j, other in enumerate(logits)
        if i != j
    ]
    return torch.stack(pairs).sum() / (len(logits) - 1)


def mean_log_probability(logits: Sequence[Tensor]) -> Tensor:
    r"""Return the logarithm of the classifiers' mean prediction, \(\log \bar p\).

    Args:
        logits: Logits ``B x K`` of each of n classifiers.

    Returns:
        ``B x K`` float32.
    """
    every = torch.stack([F.log_softmax(each.float(), dim=1) for each in logits])
    return every.logsumexp(dim=0) - math.log(len(logits))


def js_divergence(logits: Sequence[Tensor]) -> Tensor:
    r"""Return the Jensen-Shannon divergence of n classifiers' predictions, J of the equations.

    It is computed as \(\frac1n \sum_i \mathrm{KL}(p_i \| \bar p)\), which is equal and exact near 0. Gradients flow
    into all logits.

    Args:
        logits: Logits ``B x K`` of each of n classifiers.

    Returns:
        ``B`` float32 from 0 to log n, in nats.

    Example:
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


def all_logits(student: NetOutput) -> list[Tensor]:
    """Return the logits ``B x K`` of all classifiers, the student's first.

    Args:
        student: Output of the student with its peers.
    """
    return [student.logits, *(branch.logits for branch in student.branches)]
