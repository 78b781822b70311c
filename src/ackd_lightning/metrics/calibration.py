r"""Calibration of a classifier: whether an answer with confidence 0.8 is right in 80 % of the cases.

Guo et al.: On Calibration of Modern Neural Networks, 2017. The expected calibration error is
\(\sum_b \frac{|B_b|}{N} |\mathrm{acc}(B_b) - \mathrm{conf}(B_b)|\) over 15 bins of equal width (Eq. 5); temperature
scaling divides the logits by the T that minimises the cross-entropy on validation data (Eq. 9).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

BINS = 15
"""Number of bins of equal width of the confidence."""
_LARGEST = 100.0
"""Largest temperature, and the inverse of the smallest; a network that is never wrong has no finite best one."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration of a classifier on N images.

    Attributes:
        nll: Mean negative log-likelihood of the true class, in nats.
        ece: Expected calibration error, from 0 to 1.
    """

    nll: float
    ece: float


def measure_calibration(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> Calibration:
    """Measure negative log-likelihood and expected calibration error.

    Args:
        logits: Logits, ``N x K``.
        target: ``N`` int64.
        temperature: Number by which logits are divided.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2]]).log().repeat(10, 1)  # right in 6 of 10 cases, with confidence 0.8
        >>> result = measure_calibration(logits, torch.tensor([0] * 6 + [1] * 4))
        >>> f"{result.nll:.4f} {result.ece:.2f}"
        '0.7777 0.20'
    """
    bins = reliability(logits, target, temperature=temperature)
    gaps = torch.where(bins.count > 0, (bins.accuracy - bins.confidence).abs(), 0.0) * bins.count / len(target)
    return Calibration(float(F.cross_entropy(logits.double() / temperature, target)), float(gaps.sum()))


@dataclass(frozen=True, slots=True)
class Reliability:
    """Points of a reliability diagram: `BINS` bins of the confidence, from 0 to 1.

    Attributes:
        count: Number of images in each bin.
        confidence: Mean probability of the predicted class in each bin; NaN in an empty one.
        accuracy: Share of right predictions in each bin; NaN in an empty one.
    """

    count: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> Reliability:
    """Sort predictions into bins of their confidence.

    Args:
        logits: Logits, ``N x K``.
        target: ``N`` int64.
        temperature: Number by which logits are divided.

    Examples:
        >>> bins = reliability(torch.tensor([[0.75, 0.25]]).log().repeat(10, 1), torch.tensor([0] * 6 + [1] * 4))
        >>> bins.count.nonzero().flatten().tolist(), f"{bins.accuracy[11]:.1f}", f"{bins.confidence[11]:.2f}"
        ([11], '0.6', '0.75')
    """
    confidence, prediction = (logits.double() / temperature).softmax(dim=1).max(dim=1)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    right = (prediction == target).double()
    count, shares, rights = (
        torch.zeros(BINS, dtype=torch.float64, device=logits.device).index_add(0, place, values)
        for values in (torch.ones_like(right), confidence, right)
    )
    return Reliability(count.long().cpu(), (shares / count).cpu(), (rights / count).cpu())


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """Find the temperature that minimises the cross-entropy; fit it on validation data, never on the test set.

    Args:
        logits: Logits, ``N x K``.
        target: ``N`` int64.

    Returns:
        Temperature from 0.01 to 100. Above 1 the network was too confident, below 1 not confident enough.

    Examples:
        >>> logits = 2 * torch.tensor([[0.8, 0.2]]).log().repeat(10, 1)
        >>> f"{fit_temperature(logits, torch.tensor([0] * 8 + [1] * 2)):.3f}"
        '2.000'
    """
    scores, limit = logits.double(), math.log(_LARGEST)

    def loss(logarithm: float) -> float:
        return float(F.cross_entropy(scores * math.exp(-logarithm), target))

    found = minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-5})
    return math.exp(float(found.x))
