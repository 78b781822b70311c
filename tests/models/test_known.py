"""Networks that are looked at once."""

from __future__ import annotations

from torch import nn

from ackd_lightning.models.known import remembered


def test_plans_given_as_lists_are_told_apart():
    """A list has no hash of its own."""
    first, second, third = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 3)
    first.stage_plan, second.stage_plan, third.stage_plan = ["a"], ["b"], ["a"]
    asked = ("test_plans_given_as_lists_are_told_apart",)
    found = [remembered(each, asked, lambda each=each: each) for each in (first, second, third)]
    assert found == [first, second, first]
