from __future__ import annotations

import math

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.metrics.intervals import (
    mean_interval,
    paired_bootstrap,
    paired_test,
    say_difference,
    share_text,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (3, 10), (10, 10), (777, 1000)])
def test_wilson_interval_is_the_published_formula(correct, total):
    z, share = 1.959963984540054, correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    assert wilson_interval(correct, total) == pytest.approx((centre - half, centre + half), abs=1e-9)


def answers(both: int, only_first: int, only_second: int, none: int) -> tuple[torch.Tensor, torch.Tensor]:
    counts = (both, only_first, only_second, none)
    first = [row for row, count in zip((1, 1, 0, 0), counts, strict=True) for _ in range(count)]
    second = [row for row, count in zip((1, 0, 1, 0), counts, strict=True) for _ in range(count)]
    return torch.tensor(first).bool(), torch.tensor(second).bool()


@pytest.mark.parametrize(("only_first", "only_second"), [(15, 5), (5, 15), (0, 4), (8, 8), (40, 10)])
def test_mcnemar_is_the_sum_of_binomial_probabilities(only_first, only_second):
    result = paired_test(*answers(50, only_first, only_second, 20))
    count, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, each) for each in range(fewer + 1)) / 2**count
    assert result.p_value == pytest.approx(min(1.0, 2 * tail))
    assert (result.only_first, result.only_second) == (only_first, only_second)


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    first, second = answers(700, 120, 60, 120)
    result = paired_test(first, second)
    differences = first.double() - second.double()
    half = 1.96 * float(differences.std()) / math.sqrt(1000)
    assert result.difference == pytest.approx(0.06)
    assert result.low == pytest.approx(0.06 - half, abs=0.003)
    assert result.high == pytest.approx(0.06 + half, abs=0.003)
    assert paired_test(first, second) == result


@pytest.mark.parametrize("counts", [(37, 56, 19, 539), (50, 7, 3, 1), (20, 4, 4, 2)])
def test_an_interval_is_the_same_from_both_sides(counts):
    first, second = answers(*counts)
    there, back = paired_test(first, second), paired_test(second, first)
    assert (back.low, back.high) == (-there.high, -there.low)
    assert back.p_value == there.p_value
    assert str(paired_bootstrap(first, first)) == "(0.0, 0.0, 0.0)"
    shares = (first.double() + second.double()) / 3, second.double()
    difference, low, high = paired_bootstrap(*shares)
    assert paired_bootstrap(*reversed(shares)) == (-difference, -high, -low)


def test_the_sentence_names_the_better_one_and_whether_it_may_be_chance():
    sure, unsure = paired_test(*answers(50, 5, 45, 0)), paired_test(*answers(80, 6, 4, 10))
    assert sure.differs
    assert sure.sentence("a", "b").startswith("b is 40.00 points better than a")
    assert "p < 0.001" in sure.sentence("a", "b")
    assert not unsure.differs
    assert "may be chance" in unsure.sentence("a", "b")
    low, high = unsure.sentence("a", "b").split("interval ")[1].split(")")[0].split(" to ")
    assert float(low) < 2 < float(high)


def test_a_difference_by_rounding_alone_is_none():
    assert say_difference("a", "b", 0.1 + 0.2 - 0.3, -0.1, 0.1).startswith("a and b are equally accurate")


@pytest.mark.parametrize("counts", [(3, 4), (0, 0)])
def test_answers_must_belong_to_the_same_images(counts):
    with pytest.raises(ACKDError):
        paired_test(*(torch.ones(count).bool() for count in counts))


def test_texts():
    assert share_text(1, 2).startswith("50.00 %")
    assert mean_interval([1.0]) is None
