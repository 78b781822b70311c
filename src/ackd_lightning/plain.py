"""Plain data: what a checkpoint and a configuration can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def is_plain(value: Any) -> bool:
    """Return whether a checkpoint can hold a value as it is: text, a number, None, or lists and mappings of these.

    Args:
        value: Argument of a constructor.

    Examples:
        >>> is_plain({"widths": [16, 32]}), is_plain(print)
        (True, False)
    """
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return type(value) is dict and all(is_plain(each) for pair in value.items() for each in pair)
    return value is None or type(value) in (bool, int, float, str)


def as_plain(value: Any) -> Any:
    """Return a value with NumPy's scalars in it as Python's, which a checkpoint can hold.

    Args:
        value: Any value; only lists, tuples and mappings are looked into.

    Examples:
        >>> as_plain({"lr": np.float64(0.1), "names": [np.str_("cat")]})
        {'lr': 0.1, 'names': ['cat']}
    """
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(as_plain, value))
    return {as_plain(key): as_plain(each) for key, each in value.items()} if type(value) is dict else value
