"""Metadata of a weight file: the entries that a teacher needs, as numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ackd_lightning.errors import ACKDError

LARGEST_INPUT = 4096
"""Largest height and width of an image, in pixels, that a weight file or a configuration may state."""


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and 0 < side <= LARGEST_INPUT for side in sides)


def typed_metadata(metadata: Mapping[str, str], weights: str) -> dict[str, Any]:
    """Read preprocessing and accuracy from the metadata of a weight file, as numbers.

    Args:
        metadata: Text that ``load_weights`` returned.
        weights: Name of the weight file in error messages.

    Returns:
        The entries ``mean``, ``std``, ``input_size``, ``class_names``, ``val_acc`` and ``test_acc`` that the file has.

    Raises:
        ACKDError: If an entry has a value that it cannot have.
    """
    found: dict[str, Any] = {}
    for key, right, allowed in (
        ("mean", lambda values: len(values) > 0 and all(map(math.isfinite, values)), "a list of numbers"),
        ("std", lambda values: len(values) > 0 and all(0 < each < math.inf for each in values), "numbers above 0"),
        (
            "input_size",
            _is_size,
            f"a whole number of pixels from 1 to {LARGEST_INPUT}, or height and width",
        ),
        (
            "class_names",
            lambda value: (
                isinstance(value, list)
                and len(set(value)) == len(value) > 0
                and all(isinstance(each, str) for each in value)
            ),
            "a list of different names",
        ),
        ("val_acc", lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        ("test_acc", lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    ):
        if key not in metadata:
            continue
        try:
            found[key] = json.loads(metadata[key])
            good = right(found[key])
        except (ValueError, TypeError, RecursionError):
            good = False
        if not good:
            raise ACKDError(
                f"{key} is {metadata[key][:60]!r} in the metadata of {weights}; it must be {allowed}, so export the "
                "file again"
            )
    if ("mean" in found) != ("std" in found) or len(found.get("mean", [])) != len(found.get("std", [])):
        raise ACKDError(f"mean and std have different lengths in the metadata of {weights}; export the file again")
    return found
