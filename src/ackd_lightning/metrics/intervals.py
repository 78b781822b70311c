"""Uncertainty of an accuracy, and whether two networks differ on the same images.

Wilson: Probable Inference, the Law of Succession, and Statistical Inference, 1927. McNemar: Note on the Sampling Error
of the Difference Between Correlated Proportions or Percentages, 1947; here its exact form, a binomial test.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, t
from torch import Tensor

from ackd_lightning.errors import ACKDError

TOP5_CLASSES = 20
"""Classes from which on top-5 accuracy is shown; of six classes, five answers are nearly all."""


def wilson_interval(correct: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's confidence interval of a share, which holds for few images and for shares near 0 and 1, too.

    Args:
        correct: Number of correct answers.
        total: Number of answers, at least 1.
        confidence: Probability that the interval covers the true share.

    Returns:
        Lower and upper end, from 0 to 1.

    Examples:
        >>> low, high = wilson_interval(80, 100)
        >>> f"{low:.4f} {high:.4f}"
        '0.7112 0.8666'
    """
    found = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Comparison of two classifiers on the same N images.

    Attributes:
        both: Number of images that both classify correctly.
        only_first: Number of images that only the first classifies correctly.
        only_second: Number of images that only the second classifies correctly.
        total: N.
        p_value: Two-sided p-value of McNemar's exact test: the probability of such a difference, or a larger one, if
            each of the images that one of them classifies correctly were equally likely to be the first's and the
            second's.
        low: Lower end of the 95 % bootstrap interval of the difference of accuracies, first minus second.
        high: Upper end of it.
    """

    both: int
    only_first: int
    only_second: int
    total: int
    p_value: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.only_first - self.only_second) / self.total

    @property
    def differs(self) -> bool:
        """Whether the difference is significant at the level of 5 %."""
        return self.p_value < 0.05

    def sentence(self, first: str, second: str) -> str:
        """Say the result in words.

        Args:
            first: Name of the first classifier.
            second: Name of the second.

        Examples:
            >>> import torch
            >>> right = torch.tensor([1] * 90 + [0] * 10).bool()
            >>> paired_test(right, right).sentence("KD", "ACKD")
            'KD and ACKD classify the same 90 of 100 images correctly, so there is no difference to test'
        """
        if not self.only_first + self.only_second:
            return (
                f"{first} and {second} classify the same {self.both:,} of {self.total:,} images correctly, so there is "
                "no difference to test"
            )
        better, worse = (first, second) if self.difference >= 0 else (second, first)
        more, fewer = sorted((self.only_first, self.only_second), reverse=True)
        p_value = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        return (
            f"{say_difference(first, second, self.difference, self.low, self.high)}: of {self.total:,} images {more:,} "
            f"are right only with {better} and {fewer:,} only with {worse}; "
            f"{say_verdict(self.differs)} (McNemar's exact test, {p_value})"
        )


_NOTHING = 1e-9
"""Difference below which two means of shares are equal but for rounding."""


def say_difference(first: str, second: str, difference: float, low: float, high: float) -> str:
    """Say which of two accuracies is higher, and by how much.

    Args:
        first: Name of the first classifier.
        second: Name of the second.
        difference: Accuracy of the first minus that of the second, from -1 to 1.
        low: Lower end of the 95 % interval of the difference.
        high: Upper end of it.

    Examples:
        >>> say_difference("KD", "CE", -0.02, -0.05, 0.01)
        'CE is 2.00 points better than KD (95 % interval -1.00 to 5.00)'
    """
    if difference < 0:
        first, second, difference, low, high = second, first, -difference, -high, -low
    if abs(difference) < _NOTHING:
        return f"{first} and {second} are equally accurate (95 % interval {100 * low:.2f} to {100 * high:.2f} points)"
    return (
        f"{first} is {100 * difference:.2f} points better than {second} (95 % interval {100 * low:.2f} to "
        f"{100 * high:.2f})"
    )


def say_verdict(differs: bool) -> str:
    """Say whether a difference is significant.

    Args:
        differs: Whether it is.
    """
    return "the difference is significant" if differs else "the difference may be chance"


def paired_test(first: Tensor, second: Tensor, *, draws: int = 2000, seed: int = 0) -> PairedTest:
    """Compare two classifiers on the same images by McNemar's exact test and a paired bootstrap.

    Only images that one of the two classifies correctly and the other does not say anything about the difference.

    Args:
        first: ``N`` bool, whether the first classifier is right.
        second: ``N`` bool, the same for the second.
        draws: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        ACKDError: If the numbers of images differ, or there are none.

    Examples:
        >>> import torch
        >>> first = torch.tensor([1] * 70 + [1] * 15 + [0] * 5 + [0] * 10).bool()
        >>> second = torch.tensor([1] * 70 + [0] * 15 + [1] * 5 + [0] * 10).bool()
        >>> result = paired_test(first, second)
        >>> result.only_first, result.only_second, f"{result.difference:.2f}", f"{result.p_value:.4f}"
        (15, 5, '0.10', '0.0414')
    """
    if first.shape != second.shape or first.dim() != 1 or not len(first):
        raise ACKDError(
            f"the answers to compare have the shapes {tuple(first.shape)} and {tuple(second.shape)}; give one for each "
            "of the same images"
        )
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    total, discordant = len(first), only_first + only_second
    p_value = float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0
    _, low, high = paired_bootstrap(first, second, draws=draws, seed=seed)
    return PairedTest(int((first & second).sum()), only_first, only_second, total, p_value, low, high)


def paired_bootstrap(first: Tensor, second: Tensor, *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Compute the 95 % bootstrap interval of a difference of accuracies over the same images.

    Images are drawn with replacement, and both classifiers, or both groups of them, answer the same ones. The interval
    shows how much the difference depends on the images, not how much it depends on the seeds of training.

    Args:
        first: ``N``, whether the first classifier is right, or the share of a group that is right.
        second: ``N``, the same for the second.
        draws: Number of samples.
        seed: Seed of the samples.

    Returns:
        Difference, first minus second, and the lower and upper end of its interval.

    Examples:
        >>> import torch
        >>> first, second = torch.ones(100), torch.tensor([1.0] * 80 + [0.0] * 20)
        >>> [round(each, 2) for each in paired_bootstrap(first, second)]
        [0.2, 0.12, 0.28]
    """
    values, counts = (first.double() - second.double()).unique(return_counts=True)  # type: ignore[no-untyped-call]
    total, turned = len(first), [*zip((-values).tolist(), counts.tolist(), strict=True)][::-1]
    straight = [*zip(values.tolist(), counts.tolist(), strict=True)]
    if turned > straight:  # both orders draw the same images
        difference, low, high = paired_bootstrap(second, first, draws=draws, seed=seed)
        return -difference, -high, -low
    samples = np.random.default_rng(seed).multinomial(total, (counts / total).numpy(), size=draws)
    low, high = np.quantile(samples @ values.numpy() / total, [0.025, 0.975])
    if turned == straight:
        high = max(high, -low)
        low = 0.0 - high  # no -0.0
    return float((values * counts).sum() / total), float(low), float(high)


def share_text(correct: int, total: int) -> str:
    """Return a share in percent with its 95 % Wilson interval as text.

    Args:
        correct: Number of correct answers.
        total: Number of answers.

    Examples:
        >>> share_text(80, 100)
        '80.00 % (95 % interval 71.12 to 86.66)'
    """
    low, high = wilson_interval(correct, total)
    return f"{100 * correct / total:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f})"


def difference_interval(
    first: Sequence[float], second: Sequence[float], resolution: float = 0.0
) -> tuple[float, float] | None:
    """Compute the 95 % interval of a difference of two means over seeds by Welch's t; None without two values in each.

    Args:
        first: One value for each seed.
        second: Values that are subtracted.
        resolution: Step in which the values are measured, such as the share of one image.

    Examples:
        >>> low, high = difference_interval([90.0, 91.0, 92.0], [88.0, 90.0, 89.0])
        >>> f"{low:.2f} {high:.2f}"
        '-0.27 4.27'
    """
    if min(len(first), len(second)) < 2:
        return None
    mean = statistics.fmean(first) - statistics.fmean(second)
    parts = [(_deviation(each, resolution) ** 2 / len(each), len(each) - 1) for each in (first, second)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return mean, mean
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    margin = variance**0.5 * float(t.ppf(0.975, freedom))
    return mean - margin, mean + margin


def mean_interval(values: Sequence[float], resolution: float = 0.0) -> tuple[float, float] | None:
    """Compute the 95 % interval of a mean over seeds by Student's t; None for fewer than two values.

    Args:
        values: One value for each seed.
        resolution: Step in which the values are measured, such as the share of one image.

    Examples:
        >>> low, high = mean_interval([90.0, 91.0, 92.0])
        >>> f"{low:.2f} {high:.2f}"
        '88.52 93.48'
    """
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    margin = _deviation(values, resolution) / len(values) ** 0.5 * float(t.ppf(0.975, len(values) - 1))
    return mean - margin, mean + margin


def _deviation(values: Sequence[float], resolution: float) -> float:
    """Sample standard deviation, at least that of rounding: equal numbers of images are no equal trainings."""
    return max(statistics.stdev(values), resolution / 12**0.5)
