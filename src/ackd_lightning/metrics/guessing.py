"""Whether a classifier knows more than one that guesses, also where most images are of one class."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class MeanRecall(NamedTuple):
    """Mean over classes of the share of their images that are recognised.

    A constant answer is right for many images where one class has most of them; its mean recall is that of guessing.

    Attributes:
        value: Mean over the classes that occur; 0 without images.
        occurring: Number of classes that occur.
        chance: Mean recall of guessing among the classes that occur, or among all where no more than one does.
        deviation: Standard deviation of the mean recall of guessing.
    """

    value: float
    occurring: int
    chance: float
    deviation: float

    @property
    def may_be_chance(self) -> bool:
        """Whether guessing may be as good: the mean recall is at most two standard deviations above it."""
        return self.value <= self.chance + 2.0 * self.deviation


def mean_recall(targets: Tensor, answers: Tensor, num_classes: int) -> MeanRecall:
    """Compare the mean recall of the classes with that of guessing.

    Args:
        targets: ``N`` int64 classes.
        answers: ``N`` int64 classes.
        num_classes: Number K of classes.

    Examples:
        >>> found = mean_recall(torch.tensor([0, 0, 0, 1]), torch.zeros(4, dtype=torch.int64), 2)
        >>> found.value, found.chance, found.may_be_chance
        (0.5, 0.5, True)
    """
    counts = torch.bincount(targets, minlength=num_classes)
    right = torch.bincount(targets[targets == answers], minlength=num_classes)
    occurs = counts > 0
    counts, right, occurring = counts[occurs].double(), right[occurs], int(occurs.sum())
    chance = 1.0 / (occurring if occurring > 1 else num_classes)
    deviation = math.sqrt(chance * (1.0 - chance) * float((1.0 / counts).sum())) / max(occurring, 1)
    return MeanRecall(float((right / counts).sum()) / max(occurring, 1), occurring, chance, deviation)
