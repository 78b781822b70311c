"""Check constructor arguments against their annotations, in one place for Python and the command line."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ackd_lightning.errors import ACKDError, near_matches


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed values of a number, as metadata of ``Annotated``.

    Args:
        low: Smallest allowed value.
        high: Largest allowed value.
        open_low: Whether ``low`` itself is excluded.
        open_high: Whether ``high`` itself is excluded.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'below' if self.open_high else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, (low, high))) or "finite"


Positive = Annotated[float, Range(0, open_low=True)]
"""A finite number above 0."""
NonNegative = Annotated[float, Range(0)]
"""A finite number that is 0 or more."""
Fraction = Annotated[float, Range(0, 1)]
"""A number from 0 to 1."""
PositiveInt = Annotated[int, Range(1)]
"""A whole number that is 1 or more."""
NonNegativeInt = Annotated[int, Range(0)]
"""A whole number that is 0 or more."""


def check_arguments(owner: type, arguments: Mapping[str, Any], *, named: type | None = None) -> None:
    """Refuse arguments that the annotations of a constructor do not allow.

    Checked are numbers (their kind and their `Range`), text, booleans, ``Literal`` choices, unions of these, and the
    elements of sequences. Every other annotation is left to its owner.

    Args:
        owner: Class whose constructor takes the arguments.
        arguments: Values by name of the argument.
        named: Class that a message names, derived from ``owner``; None for ``owner`` itself.

    Raises:
        ACKDError: Naming the argument, its value, the class and the allowed values.

    Examples:
        >>> class Example:
        ...     def __init__(self, *, mode: Literal["map", "pooled"] = "map") -> None: ...
        >>> check_arguments(Example, {"mode": "mapp"})
        Traceback (most recent call last):
        ackd_lightning.errors.ACKDError: mode is 'mapp' in Example; it must be 'map' or 'pooled'; did you mean 'map'?
    """
    hints = _hints(owner)
    for name, value in arguments.items():
        problem = _problem(value, hints[name]) if name in hints else None
        if problem is not None:
            raise ACKDError(f"{name} is {value!r} in {(named or owner).__name__}; it must be {problem}")


def checked(constructor: Callable[..., None]) -> Callable[..., None]:
    """Decorate a constructor so that its arguments are checked before it runs.

    Args:
        constructor: ``__init__`` of a class.
    """
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def checking(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs).arguments
        owner = next(cls for cls in type(self).__mro__ if cls.__dict__.get("__init__") is checking)
        check_arguments(owner, dict(list(bound.items())[1:]), named=type(self))
        constructor(self, *args, **kwargs)

    return checking


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    constructor = owner.__init__  # type: ignore[misc]  # of a class, not of an instance
    try:
        return get_type_hints(inspect.unwrap(constructor), include_extras=True)
    except (NameError, TypeError):
        return {}  # an annotation that exists only while types are checked


def _problem(value: Any, hint: Any) -> str | None:
    """Describe what a value must be, or return None when it is allowed."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _problem(value, arguments[0]) or _outside(value, hint.__metadata__)
    if origin in (Union, UnionType):
        problems = [_problem(value, each) for each in arguments]
        if None in problems:
            return None
        kind = next((p for p, each in zip(problems, arguments, strict=True) if _same_kind(value, each)), None)
        return kind or " or ".join(dict.fromkeys(str(p) for p in problems))
    if origin is Literal:
        if any(value == each and type(value) is type(each) for each in arguments):
            return None
        near = near_matches(str(value), [str(each) for each in arguments], otherwise="")
        return " or ".join(repr(each) for each in arguments) + (f"; {near}" if near else "")
    if origin in (list, tuple, Sequence):
        return _sequence_problem(value, arguments)
    plain: dict[Any, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"),
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        str: ((str,), "text"),
        NoneType: ((NoneType,), "null"),
    }
    if hint not in plain:
        return None
    kinds, words = plain[hint]
    fits = isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))
    if fits and isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    return None if fits else words


def _same_kind(value: Any, hint: Any) -> bool:
    """Whether a value has the kind of an annotation, its range left aside."""
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(bare) is Literal:
        return isinstance(value, str)
    return (
        bare is not NoneType
        and get_origin(bare) is None
        and bare in (int, float, str, bool)
        and _problem(value, bare) is None
    )


def _outside(value: Any, metadata: tuple[Any, ...]) -> str | None:
    return next((str(each) for each in metadata if isinstance(each, Range) and value not in each), None)


def _sequence_problem(value: Any, arguments: tuple[Any, ...]) -> str | None:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__") or not hasattr(value, "__len__"):
        return "a list, such as [1, 2]"
    inner = next((each for each in arguments if each is not Ellipsis), Any)
    problems = (_problem(each, inner) for each in value)
    found = next((problem for problem in problems if problem is not None), None)
    return None if found is None else f"a list whose elements are each {found}"
