"""What guessing reaches, with even and uneven classes, few images and classes that do not occur."""

from __future__ import annotations

import pytest
import torch

from ackd_lightning.metrics.guessing import mean_recall


def answered(accuracy: float, classes: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets, as many of each class, and answers of which a share is right in each class."""
    targets = torch.arange(images) % classes
    right = torch.arange(images) < round(accuracy * images)
    return targets, torch.where(right, targets, (targets + 1) % classes)


@pytest.mark.parametrize(
    ("accuracy", "classes", "count", "expected"),
    [
        (0.1, 10, 1000, True),
        (0.115, 10, 1000, True),
        (0.15, 10, 1000, False),
        (0.02, 100, 500, False),
        (0.6, 2, 50, True),
        (0.75, 2, 8, True),
        (0.75, 2, 800, False),
    ],
)
def test_chance_of_even_classes(accuracy, classes, count, expected):
    found = mean_recall(*answered(accuracy, classes, count), classes)
    assert (found.value, found.occurring, found.chance) == (pytest.approx(accuracy), classes, 1 / classes)
    assert found.deviation == pytest.approx((found.chance * (1 - found.chance) / count) ** 0.5)
    assert found.may_be_chance is expected


def test_a_constant_answer_is_chance_where_one_class_has_most_images():
    targets = torch.tensor([0] * 700 + [1] * 200)
    assert mean_recall(targets, torch.zeros_like(targets), 2).may_be_chance
    assert mean_recall(targets, targets, 2) == (1.0, 2, 0.5, pytest.approx((0.25 * (1 / 700 + 1 / 200)) ** 0.5 / 2))


def test_guessing_is_among_the_classes_that_occur():
    targets = torch.tensor([3] * 20 + [5] * 20)
    assert mean_recall(targets, torch.full_like(targets, 3), 10)[:3] == (0.5, 2, 0.5)
    assert mean_recall(targets[:20], targets[:20], 10)[:3] == (1.0, 1, 0.1)
    assert mean_recall(targets[:0], targets[:0], 10) == (0.0, 0, 0.1, 0.0)
