"""Which classes settings may name: sub-classes of what an argument is declared to take, and nothing else."""

from __future__ import annotations

import argparse
import functools
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from ackd_lightning.errors import ACKDError, near_matches

_PLAIN = (object, type, type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, Any)


def check_classes(
    settings: Mapping[str, Any], classes: Mapping[str, type], arguments_of: Mapping[str, type]
) -> dict[str, type]:
    """Refuse every ``class_path`` that is not a sub-class of what its argument is declared to take.

    An argument declared ``Any``, a plain container or a function takes no class at all: jsonargparse would build
    whatever is named there. Classes are imported, since their type is not known otherwise; nothing is called.

    Args:
        settings: Settings as read from files, or as parsed.
        classes: Sections that name a class, and what it must be a sub-class of.
        arguments_of: Sections that hold the arguments of a class directly, and that class.

    Returns:
        Class by the dotted name of the setting that names it, ``init_args`` left out of it.

    Raises:
        ACKDError: Naming the setting and the class.
    """
    found: dict[str, type] = {}
    for key, value in settings.items():
        if key in arguments_of:
            found |= _check_arguments(value, arguments_of[key], key)
        else:
            found |= _check(value, (classes[key],) if key in classes else (), key)
    return found


@functools.cache
def declared(owner: type, name: str) -> tuple[type, ...]:
    """Return the classes in the declared type of a constructor's argument; none for plain data.

    Args:
        owner: Class whose constructor, or that of a base class, has the argument.
        name: Name of the argument.
    """
    for cls in owner.__mro__:
        constructor = cls.__dict__.get("__init__")
        if not inspect.isfunction(constructor) or name not in inspect.signature(constructor).parameters:
            continue
        try:
            return tuple(dict.fromkeys(_classes(get_type_hints(constructor).get(name))))
        except (NameError, TypeError):
            return ()  # a type that only exists while types are checked
    return ()


def _classes(annotation: Any) -> Iterator[type]:
    origin = get_origin(annotation)
    for each in get_args(annotation):
        # the arguments of a function are a list: only what it returns may be a class
        yield from _classes(each) if not isinstance(each, list) else ()
    cls = annotation if origin is None else origin
    if isinstance(cls, type) and cls not in _PLAIN and cls.__module__ not in ("types", "collections.abc"):
        yield cls  # what is not a union, a container or a function


def _check(value: Any, kinds: tuple[type, ...], place: str) -> dict[str, type]:
    """Check one value and everything below it; return the classes that are named there."""
    value = _plain(value)
    found: dict[str, type] = {}
    if isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            found |= _check(each, kinds, f"{place}.{number}")
    elif isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        found[place] = _resolve(value["class_path"], kinds, place)
        found |= _check_arguments(value.get("init_args"), found[place], place)
        _check(value.get("dict_kwargs"), (), place)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            owner = next((kind for kind in kinds if name in _parameters(kind)), None)
            found |= _check(inner, declared(owner, name) if owner else kinds, f"{place}.{name}")
    elif callable(value) and not isinstance(value, type) and type(value).__module__.partition(".")[0] != "jsonargparse":
        shown = getattr(value, "__name__", type(value).__name__)
        raise ACKDError(
            f"setting {place} names the function {shown!r}; settings may name classes only, so leave it out"
        )
    return found


@functools.cache
def _parameters(kind: type) -> Iterable[str]:
    """Names of the arguments of a class; none for one in C, such as ``timedelta``, that does not tell."""
    try:
        return inspect.signature(kind).parameters
    except ValueError:
        return ()


def _check_arguments(arguments: Any, owner: type, place: str) -> dict[str, type]:
    """Check the arguments of a class, apart from its own defaults."""
    arguments, own = _plain(arguments), inspect.signature(owner).parameters
    found: dict[str, type] = {}
    for name, inner in arguments.items() if isinstance(arguments, Mapping) else ():
        if name not in own or inner is not own[name].default:
            found |= _check(inner, declared(owner, name), f"{place}.{name}")
    return found


def _plain(value: Any) -> Any:
    return vars(value) if isinstance(value, argparse.Namespace) else value


def _resolve(path: str, kinds: tuple[type, ...], place: str) -> type:
    if not kinds:
        raise ACKDError(f"setting {place} names the class {path!r} but takes plain data; leave class_path out")
    if "." not in path:  # jsonargparse looks a bare name up among the sub-classes
        below = {each.__name__: each for kind in kinds for each in sub_classes(kind)}
        if path in below:
            return below[path]
        hint = _near(path, below) or "write its package, too, as in package.Class"
        raise ACKDError(f"setting {place} names the class {path!r}, which does not exist; {hint}")
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        module = sys.modules.get(path.rpartition(".")[0])
        classes = [name for name, each in vars(module).items() if isinstance(each, type)] if module else []
        hint = _near(path.rpartition(".")[2], classes)
        raise ACKDError(
            f"class_path {path!r} cannot be imported ({error}); "
            f"{hint or 'check its spelling, and that its file is installed or in this folder'}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, kinds)):
        expected = " or ".join(kind.__qualname__ for kind in kinds)
        kind = "" if isinstance(found, type) or not callable(found) else ", which is a function"
        raise ACKDError(f"setting {place} names {path!r}{kind}; it must be a sub-class of {expected}")
    return found


def _near(name: str, known: Iterable[str]) -> str:
    """Return a hint at names that are similar, or that differ in upper and lower case alone; empty for none."""
    names = [each for each in known if not each.startswith("_")]
    if same := next((each for each in names if each.lower() == name.lower()), None):
        return f"did you mean {same!r}?"
    return near_matches(name, names, otherwise="")


def sub_classes(kind: type) -> Iterator[type]:
    """Yield a class and all that are derived from it, as far as they are imported.

    Args:
        kind: Class.
    """
    yield kind
    children: list[type] = type.__subclasses__(kind)
    for each in children:
        yield from sub_classes(each)
