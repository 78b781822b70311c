from __future__ import annotations

import pytest

from ackd_lightning.errors import ACKDError, first_line, near_matches


def test_the_users_error_is_a_value_error():
    assert issubclass(ACKDError, ValueError)
    with pytest.raises(ValueError, match="write it as 3"):
        raise ACKDError("write it as 3")


def test_near_names_are_listed_nearest_first():
    assert near_matches("resnet2O", ["resnet20", "wrn_40_2"]) == "did you mean 'resnet20'?"
    hint = near_matches("resnet10", ["resnet110", "resnet8", "resnet14", "resnet20", "resnet18"], most=2)
    assert hint.count(" or ") == 1
    assert hint.startswith("did you mean 'resnet110'")


def test_few_known_names_are_listed_in_order_if_none_is_similar():
    assert near_matches("xyz", ["b", "a"]) == "known are a, b"
    assert near_matches("xyz", ["b", "a"], otherwise="") == ""
    assert near_matches("xyy", ["xyz"], otherwise="look it up") == "did you mean 'xyz'?"


def test_of_many_known_names_some_are_listed():
    hint = near_matches("xyz", [f"network{number:02}" for number in range(13)])
    assert hint.endswith("network10, network11, …")
    assert near_matches("xyz", [f"network{number:02}" for number in range(12)]).endswith("network10, network11")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(), "OSError"),
        (ValueError("\n\n  "), "ValueError"),
        (RuntimeError("\n the first\nthe second"), "the first"),
        (RuntimeError("x" * 200), "x" * 160),
    ],
    ids=["no text", "blank", "lines", "long"],
)
def test_an_error_has_a_first_line_also_without_text(error, line):
    assert first_line(error) == line
