"""Metadata of a weight file: the entries that a teacher needs, as numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ackd_lightning.errors import ACKDError

LARGEST_INPUT = 4096
"""Largest height and width of an image, in pixels, that a weight file or a configuration may state."""


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and 0 < side <= LARGEST_INPUT for side in sides)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(each, str) for each in value)


_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mean": (lambda values: len(values) > 0 and all(map(math.isfinite, values)), "a list of numbers"),
    "std": (lambda values: len(values) > 0 and all(0 < each < math.inf for each in values), "numbers above 0"),
    "input_size": (_is_size, f"a whole number of pixels from 1 to {LARGEST_INPUT}, or height and width"),
    "channels": (lambda value: type(value) is int and 1 <= value <= 16, "a whole number from 1 to 16"),
    "crop_pct": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "value_range": (lambda values: len(values) == 2 and values[0] < values[1], "the values that become 0 and 1"),
    "pixels": (lambda value: value in ("uint8", "float32"), "uint8 or float32"),
    "reads": (lambda value: value in ("normalised", "uint8"), "normalised or uint8"),
    "interpolation": (lambda value: value in ("nearest", "bilinear", "bicubic"), "nearest, bilinear or bicubic"),
    "class_names": (lambda value: _are_names(value) and len(set(value)) == len(value), "a list of different names"),
    "class_labels": (_are_names, "a list of words"),
    "val_acc": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "test_acc": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "val_count": (_is_count, "a whole number"),
    "test_count": (_is_count, "a whole number"),
}
_WORDS = ("interpolation", "pixels", "reads")
"""Entries that are text as they are, and not JSON."""


_OWN = ("head", "method", "model_options")
"""Entries whose form only this package knows."""


def as_text(values: Mapping[str, Any]) -> dict[str, str]:
    """Write what is known of a network as the metadata of a weight file: texts as they are, other values as JSON.

    Args:
        values: Plain data by name; None is left out.
    """
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in values.items()
        if value is not None
    }


def _read(key: str, text: str) -> tuple[Any, bool]:
    """Return the value of an entry, and whether it is one that the entry can have."""
    try:
        value = text.strip('"') if key in _WORDS else json.loads(text)
        return value, _ENTRIES[key][0](value)
    except (ValueError, TypeError, RecursionError):
        return None, False


def of_other_programs(notes: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Choose the notes beside weights that another program wrote which mean what they mean here.

    Args:
        notes: Text by name.

    Returns:
        Notes that are read, and the names of those that have another form than in the files of this package.
    """
    odd = [key for key, text in notes.items() if key in _ENTRIES and not _read(key, text)[1]]
    return {key: text for key, text in notes.items() if key not in odd and key not in _OWN}, odd


def typed_metadata(metadata: Mapping[str, str], weights: str) -> dict[str, Any]:
    """Read preprocessing, classes and accuracy from the metadata of a weight file, as numbers.

    Args:
        metadata: Text that ``load_weights`` returned.
        weights: Name of the weight file in error messages.

    Returns:
        The entries about images (``mean``, ``std``, ``input_size``, which is a side, or height and width, …), classes
        and accuracy that the file has.

    Raises:
        ACKDError: If an entry has a value that it cannot have.
    """
    found: dict[str, Any] = {}
    for key, (_, allowed) in _ENTRIES.items():
        if key not in metadata:
            continue
        found[key], good = _read(key, metadata[key])
        if not good:
            raise ACKDError(
                f"{key} is {metadata[key][:60]!r} in the metadata of {weights}; it must be {allowed}, so export the "
                "file again"
            )
        if key in ("mean", "std", "input_size", "value_range") and isinstance(found[key], list):
            found[key] = tuple(found[key])
    if ("mean" in found) != ("std" in found) or len(found.get("mean", [])) != len(found.get("std", [])):
        raise ACKDError(f"mean and std have different lengths in the metadata of {weights}; export the file again")
    return found
