"""Methods as plain data, for checkpoints: public class path and constructor arguments."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import Method
from ackd_lightning.plain import as_plain, is_plain


def describe(method: Method) -> dict[str, Any]:
    """Return a method as plain data: public class path and constructor arguments.

    Arguments that are no plain data, such as a function or a network, stand in ``left_out`` by their names.

    Args:
        method: Method to describe.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Method):
            return describe(value)
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return as_plain(value)

    arguments = {name: plain(value) for name, value in method.init_args.items()}
    left_out = [name for name, value in arguments.items() if not (is_plain(value) or isinstance(value, Tensor))]
    kept = {name: value for name, value in arguments.items() if name not in left_out}
    described = {"class_path": public_path(type(method)), "init_args": kept}
    return {**described, "left_out": left_out} if left_out else described


def public_path(cls: type) -> str:
    """Return the shortest path below the top-level package at which a class can be imported.

    Args:
        cls: A class.

    Examples:
        >>> from ackd_lightning.methods.kd import KD
        >>> public_path(KD)
        'ackd_lightning.methods.KD'
    """
    parts = cls.__module__.split(".")
    for length in range(2, len(parts)):
        package = ".".join(parts[:length])
        if getattr(importlib.import_module(package), cls.__qualname__, None) is cls:
            return f"{package}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def from_description(description: Mapping[str, Any]) -> Method:
    """Build a method from what `describe` returned.

    Args:
        description: Plain data with ``class_path`` and ``init_args``.

    Raises:
        ACKDError: If the class path does not name a `Method`, or an argument was left out.
    """
    path = str(description.get("class_path"))
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ACKDError(
            f"the method {path!r} cannot be imported ({error}); install the package it comes from"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ACKDError(f"{path!r} is not a distillation method; name a sub-class of ackd_lightning.methods.Method")

    if left_out := description.get("left_out"):
        raise ACKDError(
            f"the checkpoint does not hold {' and '.join(map(repr, left_out))} of method {found.__name__}, because a "
            f"file cannot store it; pass method={found.__name__}(...) yourself"
        )

    def built(value: Any) -> Any:
        if isinstance(value, Mapping) and "class_path" in value:
            return from_description(value)
        return [built(each) for each in value] if isinstance(value, (list, tuple)) else value

    return found(**{key: built(value) for key, value in (description.get("init_args") or {}).items()})
