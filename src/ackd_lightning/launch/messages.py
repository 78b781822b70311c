"""Errors of jsonargparse, Lightning and constructors, each turned into one sentence with value, place and remedy."""

from __future__ import annotations

import inspect
import pkgutil
import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ackd_lightning.config.files import read_config
from ackd_lightning.errors import ACKDError, near_matches

FROM_DATA = ("num_classes", "input_size", "mean", "std", "class_names")
"""What the model takes from the data, so that no setting may state it."""

_INIT = "init_args"
_CLASS_KEYS = ("class_path", _INIT, "dict_kwargs")
_SECTION = "settings, each on its own line below it"
_LIST = "a list, such as [1, 2]"
_KINDS = {"list": _LIST, "dict": "a mapping, such as {key: value}"}
_KINDS |= {"collections.abc.Sequence": _LIST, "collections.abc.Iterable": _LIST}
_CLASS = "a class, such as package.Class, with its init_args"
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))


class RefusedError(ValueError):
    """An error of a parser, before it is put into words.

    Args:
        message: jsonargparse's own account, up to hundreds of lines.
        known: Names that the parser knows.
    """

    def __init__(self, message: str, known: Iterable[str]) -> None:
        super().__init__(message)
        self.known = set(known)


@dataclass(frozen=True)
class Given:
    """What a user has given, so that a message can name the place.

    Attributes:
        configs: Paths of the configuration files by the name that the user gave.
        options: Command line without ``--config``.
        settings: Merged content of the files.
        known: Names of all settings, and of the arguments of every class that the settings name.
    """

    configs: Mapping[str, Path]
    options: Sequence[str]
    settings: Mapping[str, Any]
    known: set[str] = field(default_factory=set)

    def place(self, name: str) -> str:
        """Return the option, or the setting with its file, whose dotted name ends in a name; empty if there is none.

        Args:
            name: Name of a setting, or the last parts of it.
        """
        options = [argument.split("=")[0] for argument in self.options if argument.startswith("--")]
        if found := next((option for option in options if _ends_in(option[2:].removesuffix("+"), name)), ""):
            return found
        for config, path in reversed(list(self.configs.items())):
            if found := next((each for each in _dotted(read_config(path), "") if _ends_in(each, name)), ""):
                return f"{found} in {config}"
        return ""

    def neighbours(self, place: str) -> set[str]:
        """Return the arguments of the class that a setting belongs to.

        Args:
            place: Result of ``place``.
        """
        parts = place.partition(" in ")[0].removeprefix("--").replace(f"{_INIT}.", "").split(".")
        value: Any = self.settings
        for part in parts[:-1]:
            value = value.get(part) or (value.get(_INIT) or {}).get(part) if isinstance(value, Mapping) else None
        path = value.get("class_path") if isinstance(value, Mapping) else None
        if not isinstance(path, str) or "." not in path:
            return set()
        return {*inspect.signature(pkgutil.resolve_name(path)).parameters} - {*FROM_DATA, "self"}

    def at(self, name: str) -> str:
        """Return the place of a setting in brackets; empty if there is none."""
        place = self.place(name)
        return f" ({place})" if place else ""


def _ends_in(dotted: str, name: str) -> bool:
    return any(f".{each}".endswith(f".{name}") for each in (dotted, dotted.replace(f"{_INIT}.", "")))


def _dotted(value: Any, prefix: str) -> Iterator[str]:
    """Every key below a mapping as a dotted name without ``init_args``."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if key != _INIT:
            yield f"{prefix}{key}"
        yield from _dotted(inner, prefix if key == _INIT else f"{prefix}{key}.")


def check_shape(given: Given) -> None:
    """Refuse sections and classes of the wrong shape, which jsonargparse would describe in pages.

    Args:
        given: Settings and their places.

    Raises:
        ACKDError: Naming the setting.
    """
    for section in ("model", "data", "trainer"):
        value = given.settings.get(section)
        if value is not None and not isinstance(value, Mapping) and not (section == "data" and isinstance(value, str)):
            raise _wrong(section, value, _SECTION, given)
        if section == "data" or not isinstance(value, Mapping):
            _check_class(value, section, given)
            continue
        if "class_path" in value:
            raise ACKDError(
                f"setting {section} names the class {str(value['class_path'])!r} but holds settings directly; leave "
                f"class_path and init_args out{given.at(section)}"
            )
        for name, inner in value.items():
            if name in FROM_DATA and section == "model":
                raise ACKDError(_from_data(str(name)))
            _check_class(inner, f"{section}.{name}", given)


def _check_class(value: Any, place: str, given: Given) -> None:
    if not isinstance(value, Mapping) or not {"class_path", _INIT} & set(value):
        return
    if not isinstance(value.get("class_path", ""), str):
        raise _wrong(f"{place}.class_path", value["class_path"], "the name of a class", given)
    for key in value:
        if key not in _CLASS_KEYS:
            raise ACKDError(_unknown(str(key), f"{place}.{key}", _CLASS_KEYS, given))
    arguments = value.get(_INIT)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise _wrong(f"{place}.{_INIT}", arguments, _SECTION, given)
    for name, inner in (arguments or {}).items():
        _check_class(inner, f"{place}.{name}", given)


def _wrong(place: str, value: Any, kind: str, given: Given) -> ACKDError:
    at = given.at(place.removesuffix(f".{_INIT}"))
    return ACKDError(f"setting {place} is {str(value)[:80]!r}; it must be {kind}{at}")


def _unknown(name: str, place: str, valid: Iterable[str], given: Given) -> str:
    found, valid = given.place(place), sorted(map(str, valid))
    dotted = found.partition(" in ")[0].removeprefix("--")
    beside = [each for each in valid if each.startswith(f"{dotted.rpartition('.')[0]}.") and "." in dotted]
    neighbours = given.neighbours(found)
    hint = near_matches(name.rpartition(".")[2], neighbours) if neighbours else ""
    if beside and not neighbours:
        name, hint = dotted, near_matches(dotted, beside)
    if not hint.startswith("did"):
        wider = near_matches(name, valid)
        hint = wider if wider.startswith("did") or not hint else hint
    return f"there is no setting {name!r} here; {hint}" + (f" ({found})" if found else "")


def _from_data(name: str) -> str:
    return f"model.{name} is taken from the data; leave it out and choose the settings of the data instead"


def shorten(refused: RefusedError, given: Given) -> str:
    """Turn jsonargparse's account of an error into one sentence with the nearest valid name.

    Args:
        refused: The first of the errors that led to each other.
        given: Settings and their places.
    """
    text = " ".join(str(refused).split())
    patterns = (
        r"NestedArg\(key='([^']+)'",
        r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)",
        r"does not accept option '([^']+)'",
        r"[Uu]nrecognized arguments?: -*([^\s=]+)",
    )
    if unknown := next((found for pattern in patterns if (found := re.search(pattern, text))), None):
        name = unknown[1]
        if name.removeprefix("model.") in (*FROM_DATA, "data") and given.place(f"model.{name.removeprefix('model.')}"):
            return _from_data(name.removeprefix("model."))
        return _unknown(name, name, refused.known | given.known, given)
    if required := re.search(r"arguments are required: (.+)", text):
        return f"{required[1]} missing; name a configuration with --config (`ackd configs` lists them), or set it"
    if "expected one argument" in text:
        named = re.search(r"argument (--[\w.]+)", text)
        return f"{_without_value(given.options) or (named[1] if named else 'an option')} needs a value"
    key = re.search(r'Parser key "([^"]+)"', text)
    value = re.search(r"(?:Given value|Got value): (.{1,80})", text)
    if key is None:
        return text[:400]
    if "Unable to load config" in text:
        return f"setting {key[1]} holds settings, not a value; set {key[1]}.NAME, or name a file of settings"
    expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\.? Got value| - | Given value|$)", text))
    bare = (re.sub(r"typing\.|<class '([\w.]+)'>", r"\1", each) for each in expected)
    kinds = [re.sub(r"Literal\[(.*)\]", r"\1", each) for each in bare if each != "NoneType"]
    classes = [each for each in kinds if each.startswith(("path but", "dot import", "one of: - a class"))]
    kinds = [_KINDS.get(each, each) for each in kinds if each not in classes]
    kinds += [_CLASS] * bool(classes or not kinds)
    stated = re.sub(r"^\{'class_path': '([^']*)'\}$", r"\1", value[1]) if value else ""
    shown = f" is {stated!r}" if value else ""
    return f"setting {key[1]}{shown}; it must be {' or '.join(kinds)[:300]}{given.at(key[1])}"


def _without_value(options: Sequence[str]) -> str | None:
    """The first option that is followed by another one, or by nothing."""
    for option, then in zip(options, [*options[1:], "--"], strict=True):
        if option.startswith("--") and "=" not in option and then.startswith("--"):
            return option
    return None


def first_cause(error: BaseException | None) -> ACKDError | RefusedError | None:
    """Return the first error of this package, or of a parser, in the chain of errors that led to one.

    Args:
        error: Last error of the chain.
    """
    found: ACKDError | RefusedError | None = None
    while error is not None:
        if isinstance(error, ACKDError) or (isinstance(error, RefusedError) and not isinstance(found, ACKDError)):
            found = error
        error = error.__cause__ or error.__context__
    return found


def failed_constructor(error: Exception) -> ACKDError:
    """Put the exception of a constructor into words: what it states, and where it was raised.

    Args:
        error: Exception as it was raised, before jsonargparse wrapped it.
    """
    if isinstance(ours := first_cause(error), ACKDError):
        return type(ours)(str(ours))  # not the same one, which would become its own cause
    text = (str(error).splitlines() or [""])[0][:300]
    return ACKDError(f"{type(error).__name__} in {_place_of(error)}: {text}")


def _place_of(error: Exception) -> str:
    """File and line of an exception: in the user's own file if it passed through one, else outside torch if it did."""
    frames = traceback.extract_tb(error.__traceback__)
    package = Path(__file__).parents[1]
    own = [
        each
        for each in frames
        if not each.filename.startswith((*_LIBRARIES, "<")) and package not in Path(each.filename).parents
    ]
    frame = (own or [each for each in frames if "/torch/" not in Path(each.filename).as_posix()] or frames)[-1]
    path = Path(frame.filename)
    root = next((Path(each) for each in _LIBRARIES if Path(each) in path.parents), path.parent)
    return f"{path.relative_to(root).as_posix()} line {frame.lineno}"


def refused_by_trainer(error: Exception, names: Iterable[str]) -> str:
    """Put what Lightning's Trainer states against its settings into one sentence.

    Args:
        error: Exception of its constructor.
        names: Names of its arguments.
    """
    if isinstance(ours := first_cause(error), ACKDError):
        return str(ours)
    text = " ".join(str(error).split())
    if "backend found" in text:
        return "trainer.accelerator is gpu and torch finds no GPU on this machine; leave it out, or use cpu"
    named = next((f".{name}" for name in names if re.search(rf"\b{name}\b", text)), "")
    return f"Lightning's Trainer refuses its settings: {text[:300].rstrip('.')}; change trainer{named}"
