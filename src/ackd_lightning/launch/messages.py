"""Errors of jsonargparse, Lightning and constructors, each turned into one sentence with value, place and remedy."""

from __future__ import annotations

import inspect
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, callbacks, loggers, profilers

from ackd_lightning.config.class_paths import sub_classes
from ackd_lightning.config.files import read_config, walk
from ackd_lightning.errors import ACKDError, near_matches, not_permitted
from ackd_lightning.launch.names import is_meant, names_below, nearest, of_other_classes

FROM_DATA = ("num_classes", "input_size", "mean", "std", "class_names")
"""What the model takes from the data, so that no setting may state it."""

_INIT = "init_args"
_CLASS_KEYS = ("class_path", _INIT, "dict_kwargs")
_NEEDED = ("data", "model.student.network")
_WHOLE = "name a configuration with --config (`ackd configs` lists them), or set it"
_SECTION = "settings, each on its own line below it"
_LIST = "a list, such as [1, 2]"
_KINDS = {"list": _LIST, "dict": "a mapping, such as {key: value}"}
_KINDS |= {"collections.abc.Sequence": _LIST, "collections.abc.Iterable": _LIST}
_KINDS |= {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
_CLASS = "a class, such as package.Class, with its init_args"
_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib"))


class RefusedError(ValueError):
    """An error of a parser, before it is put into words.

    Args:
        message: jsonargparse's own account, up to hundreds of lines.
        known: Names that the parser knows: all settings, or the arguments of one class.
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
        names: Names of all settings that belong to no class that the settings choose.
        classes: Class by the name of the setting that names it.
    """

    configs: Mapping[str, Path]
    options: Sequence[str]
    settings: Mapping[str, Any]
    names: set[str] = field(default_factory=set)
    classes: dict[str, type] = field(default_factory=dict)

    def place(self, name: str) -> str:
        """Return the option, or the setting with its file, whose dotted name ends in a name; empty if there is none.

        Args:
            name: Name of a setting, or the last parts of it; the number of an element of a list may be one of them.
        """
        end, listed = f".{_plain(name)}", re.sub(r"\.\d+(?=\.)", "", f".{_plain(name)}")
        options = [option.split("=")[0] for option in self.options if option.startswith("--")]
        found = [option for option in options if f".{_plain(option)}".endswith(end)]
        for config, path in reversed(list(self.configs.items())):
            stated = [each for each, _ in walk(read_config(path)) if f".{each}".endswith(listed)]
            found += [f"{each if listed == end else _plain(name)} in {config}" for each in stated]
        return found[0] if found else ""

    def at(self, name: str) -> str:
        """Return the place of a setting in brackets; empty if there is none."""
        place = self.place(name)
        return f" ({place})" if place else ""


def _plain(place: str) -> str:
    """Dotted name of a setting without what an option or a place adds to it."""
    return place.partition(" in ")[0].removeprefix("--").removesuffix("+").replace(f"{_INIT}.", "")


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
        if section != "data" and isinstance(value, Mapping) and "class_path" in value:
            raise ACKDError(
                f"setting {section} names the class {str(value['class_path'])!r} but holds settings directly; leave "
                f"class_path and init_args out{given.at(section)}"
            )
    for place, value in walk(given.settings):
        if not isinstance(value, Mapping) or not {"class_path", _INIT} & set(value):
            continue
        if not isinstance(value.get("class_path", ""), str):
            raise _wrong(f"{place}.class_path", value["class_path"], "the name of a class", given)
        if not isinstance(value.get(_INIT) or {}, Mapping):
            raise _wrong(f"{place}.{_INIT}", value[_INIT], _SECTION, given)
        if unknown := next((str(key) for key in value if key not in _CLASS_KEYS), None):
            hint = near_matches(unknown, _CLASS_KEYS, otherwise=f"write it below {_INIT}")
            raise ACKDError(f"there is no setting {unknown!r} here; {hint}{given.at(f'{place}.{unknown}')}")


def _wrong(place: str, value: Any, kind: str, given: Given) -> ACKDError:
    at = given.at(place.removesuffix(f".{_INIT}"))
    return ACKDError(f"setting {place} is {str(value)[:80]!r}; it must be {kind}{at}")


def _unknown(name: str, known: Iterable[str], given: Given, holder: str) -> str:
    """Put an unknown setting into words.

    Args:
        name: Dotted name, or the last part of it.
        known: Names that the parser knows: all settings, or the arguments of one class.
        given: Settings and their places.
        holder: Dotted name of the setting whose value has it; empty if that is unknown.
    """
    place = given.place(name)
    own = _plain(place) or name
    if holder and not own.startswith(f"{holder}."):  # another setting of the same last name
        name, own = holder, f"{holder}.{name}"
    parent = own.rpartition(".")[0]
    known = set(known)
    top = "model" in known
    names = (known if top else {f"{parent}.{each}" for each in known}) | given.names | names_below(given.classes)
    names.discard(own)  # of an element of a list that is not there yet
    hint, near = "", nearest(own, names)
    below = {each.rpartition(".")[2] for each in near if each.rpartition(".")[0] == parent}
    if _beside_class(own, given) and below:
        hint = f"write it below {_INIT}"
    elif not any(is_meant(each, own) for each in near):
        hint = of_other_classes(own, given.classes)
    if not hint and near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    if not hint:
        beside = sorted(each for each in names if each.rpartition(".")[0] == parent)
        beside = beside or sorted(each for each in names if "." not in each)
        hint = f"known are {', '.join(beside)}"
    return f"there is no setting {own!r} here; {hint}{given.at(name)}"


def _beside_class(own: str, given: Given) -> bool:
    """Whether a setting of a file stands beside ``class_path``."""
    parent, _, last = own.rpartition(".")
    return any(
        place == parent and isinstance(value, Mapping) and {"class_path", last} <= set(value)
        for place, value in walk(given.settings)
    )


def _from_data(name: str) -> str:
    return f"model.{name} is taken from the data; leave it out and choose the settings of the data instead"


def shorten(refused: RefusedError, given: Given, *, around: str = "") -> str:
    """Turn jsonargparse's account of an error into one sentence with the nearest valid name.

    Args:
        refused: The first of the errors that led to each other.
        given: Settings and their places.
        around: The last of these errors, which names the setting that holds what is missing.
    """
    text = " ".join(str(refused).split())
    patterns = (
        r"NestedArg\(key='([^']+)'",
        r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)",
        r"Group '([^']+)' does not accept option '([^']+)'",
        r"[Uu]nrecognized arguments?: -*([^\s=]+)",
    )
    if unknown := next((found for pattern in patterns if (found := re.search(pattern, text))), None):
        name = ".".join(unknown.groups())
        if name.removeprefix("model.") in (*FROM_DATA, "data") and given.place(f"model.{name.removeprefix('model.')}"):
            return _from_data(name.removeprefix("model."))
        own, chosen = _plain(given.place(name)) or name, any(each.split("=")[0] == "--data" for each in given.options)
        if own.startswith("data.") and "data" not in given.classes and not chosen:
            student = (given.settings.get("model") or {}).get("student")
            return f"{'data' if student else ', '.join(reversed(_NEEDED))} missing; {_WHOLE}"
        holder = None if "model" in refused.known else re.search(r'Parser key "(?!config")([^"]+)"', around)
        return _unknown(name, refused.known, given, holder[1] if holder else "")
    if required := re.search(r"arguments are required: (.+)", text):
        inside = re.search(r'Parser key "([^"]+)"', text)
        missing = f"{inside[1]}.{required[1].split()[0]}" if inside else _missing(required[1], given, around)
        return f"{missing} missing; {_WHOLE if missing.split(', ')[0] in _NEEDED else 'set it'}"
    if "expected one argument" in text:
        named = re.search(r"argument (--[\w.]+)", text)
        return f"{_without_value(given.options) or (named[1] if named else 'an option')} needs a value"
    key = re.search(r'Parser key "([^"]+)"', text)
    value = re.search(r"(?:Given value|Got value): (.{1,80})", text)
    if key is None:
        return text[:400]
    if "Unable to load config" in text:
        return f"setting {key[1]} holds settings, not a value; set {key[1]}.NAME, or name a file of settings"
    names = refused.known | given.names | names_below(given.classes)
    held = [each for each in sorted(names) if each.rpartition(".")[0] == key[1]]
    if held and value and key[1] not in given.classes and not value[1].startswith("{"):
        likely = [each for each in held if each.endswith((".network", ".weights"))] or held[:2]
        return f"setting {key[1]} is {value[1]!r}; it holds settings, such as {' and '.join(likely)}{given.at(key[1])}"
    expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\.? Got value| - | Given value|$)", text))
    expected.pop("import path or a subclass spec, but got None", None)
    bare = (re.sub(r"(?:typing\.)?Literal\[(.*)\]|typing\.|<class '([\w.]+)'>", r"\1\2", each) for each in expected)
    kinds = sorted({_kind(each): None for each in bare if each != "NoneType"} or [_CLASS], key=_CLASS.__eq__)
    stated = re.sub(r"^\{'class_path': '([^']*)'\}$| - Expected an? .*", r"\1", value[1]) if value else ""
    shown = f" is {stated!r}" if value else ""
    if re.fullmatch(r"[-+.]*(nan|inf)", stated, re.IGNORECASE):
        kinds = [each.replace("a number", "a finite number") for each in kinds if each != _CLASS]
    name = _plain(given.place(key[1])) or key[1]
    if "a number" in kinds and not stated.startswith("{"):
        kinds.remove(_CLASS) if _CLASS in kinds else None
    hint = _near_class(key[1], stated) if _CLASS in kinds else ""
    if stated.endswith("Logger"):
        known = sorted(name for name in vars(loggers) if name.endswith("Logger") and name != "Logger")
        kinds = [f"one of {', '.join(known)}, or {_CLASS.replace('a class', 'another class')}"]
    return f"setting {name}{shown}; it must be {' or '.join(kinds)[:300]}{hint}{given.at(key[1])}"


def _near_class(setting: str, stated: str) -> str:
    """Propose a data module, or a class of Lightning's for the Trainer, whose name is like the one that is named."""
    if setting == "data":
        names = [each.__name__ for each in sub_classes(LightningDataModule) if each.__name__.endswith("DataModule")]
        near = near_matches(stated.rpartition(".")[2], names, otherwise="")
        return f"; {near}" if near else ""
    home = {"trainer.callbacks": callbacks, "trainer.logger": loggers, "trainer.profiler": profilers}
    name = stated.rpartition(".")[2]
    for place, module in home.items():
        near = near_matches(name, module.__all__, otherwise="") if setting == place else ""
        if near:
            return f"; {near}"
    return ""


def _missing(names: str, given: Given, around: str) -> str:
    """Dotted names of arguments that a class or the parser needs."""
    if "." in names or names == "data":
        return names
    holders = [place for place, cls in given.classes.items() if names in inspect.signature(cls).parameters]
    outside = re.search(r'Parser key "([^"]+)"', around)
    place = outside[1] if outside else holders[0] if len(holders) == 1 else ""
    return f"{place}.{names}".lstrip(".")


def _kind(expected: str) -> str:
    is_class = expected.startswith(("path but", "dot import", "one of: - a class"))
    return _CLASS if is_class else _KINDS.get(expected, expected)


def _without_value(options: Sequence[str]) -> str | None:
    """The first option that is followed by another one, or by nothing."""
    pairs = zip(options, [*options[1:], "--"], strict=True)
    return next((each for each, then in pairs if re.fullmatch("--[^=]+", each) and then.startswith("--")), None)


def first_cause(error: BaseException | None) -> ACKDError | RefusedError | None:
    """Return the first error of this package, or of a parser, in the chain of errors that led to one.

    Args:
        error: Last error of the chain.
    """
    found: ACKDError | RefusedError | None = None
    while error is not None:
        if isinstance(error, ACKDError) or (isinstance(error, RefusedError) and not isinstance(found, ACKDError)):
            found = error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def failed_constructor(error: Exception) -> ACKDError:
    """Put the exception of a constructor into words: what it states, and where it was raised.

    Args:
        error: Exception as it was raised, before jsonargparse wrapped it.
    """
    if isinstance(ours := first_cause(error), ACKDError):
        return type(ours)(str(ours))  # not the same one, which would become its own cause
    if isinstance(error, PermissionError):
        return ACKDError(not_permitted(error))
    text = (str(error).splitlines() or [""])[0][:300]
    return ACKDError(f"{type(error).__name__} in {_place_of(error)}: {text}")


def _place_of(error: Exception) -> str:
    """File and line of an exception: in the user's own file if it passed through one, else outside torch if it did."""
    frames = traceback.extract_tb(error.__traceback__)
    others = (*_LIBRARIES, "<", str(Path(__file__).parents[1]) + os.sep)
    own = [each for each in frames if not each.filename.startswith(others)]
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
    text = " ".join(str(error).split())
    if "backend found" in text:
        return "trainer.accelerator is gpu and torch finds no GPU on this machine; leave it out, or use cpu"
    named = next((f".{name}" for name in names if re.search(rf"\b{name}\b", text)), "")
    return f"Lightning's Trainer refuses its settings: {text[:300].rstrip('.')}; change trainer{named}"
