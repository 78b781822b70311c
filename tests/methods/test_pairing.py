from __future__ import annotations

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.pairing import pair_stages, same_size
from ackd_lightning.types import NetSpec


def spec(*sides: int) -> NetSpec:
    """A network with a stem and stages of these heights."""
    return NetSpec(10, ((4, 32, 32), *((8, side, side) for side in sides)), 8)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ((32, 16, 8), (32, 16, 8), ((1, 1), (2, 2), (3, 3))),
        ((16, 8, 4, 2), (16, 8, 4), ((1, 1), (2, 2), (3, 3), (4, 3))),  # MobileNetV2 - ShuffleNetV1
        ((16, 8, 4), (16, 8, 4, 2), ((1, 1), (2, 2), (3, 3), (3, 4))),
        ((8, 4, 2, 1), (32, 16, 8), ((1, 1), (2, 2), (3, 3), (4, 3))),  # ImageNet stem on small images
        ((32, 16, 8, 4, 2), (8, 2), ((1, 1), (2, 1), (3, 1), (4, 2), (5, 2))),
        ((7,), (56, 28, 14, 7), ((1, 1), (1, 2), (1, 3), (1, 4))),
    ],
)
def test_stages_meet_by_resolution_in_order_and_none_is_left_out(student, teacher, expected):
    pairs = pair_stages(spec(*student), spec(*teacher), method="AT")
    assert pairs == expected
    assert {ours for ours, _ in pairs} == set(range(1, len(student) + 1))
    assert {theirs for _, theirs in pairs} == set(range(1, len(teacher) + 1))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_network_without_known_stages_is_refused_by_its_role(role):
    specs = {"student": spec(8), "teacher": spec(8), role: NetSpec(10)}
    with pytest.raises(ACKDError, match=f"the {role}.*method AT"):
        pair_stages(specs["student"], specs["teacher"], method="AT")


def test_the_larger_map_is_pooled_whichever_side_it_is_on():
    small, large = torch.randn(2, 3, 4, 2), torch.randn(2, 5, 8, 4)
    first, second = same_size(small, large)
    assert first is small
    assert torch.allclose(second, large.unflatten(3, (2, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5)))
    second, first = same_size(large, small)
    assert first is small
    assert second.shape == (2, 5, 4, 2)
