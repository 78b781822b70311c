"""Reading a command line: which configurations, which run, and errors in one sentence."""

from __future__ import annotations

import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ackd_lightning.config.files import read_config
from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.runs.files import find_checkpoint, run_folder

FROM_DATA = ("num_classes", "input_size", "mean", "std")
"""What the model takes from the data, and no setting may say otherwise."""


_INIT = "init_args"
_OF_A_CLASS = ("class_path", _INIT, "dict_kwargs")
_TYPES = {
    "collections.abc.Sequence": "a list, such as [1, 2]",
    "collections.abc.Iterable": "a list, such as [1, 2]",
    "list": "a list, such as [1, 2]",
    "dict": "a mapping, such as {key: value}",
}
_CLASS = "a class, such as package.Class, with its init_args"


@dataclass(frozen=True)
class Given:
    """Where settings come from, so that a message can name the place.

    Attributes:
        configs: values of ``--config``, with the whole paths of their files (jsonargparse changes folders).
        rest: the other arguments.
        settings: content of the configurations, put together.
    """

    configs: Mapping[str, Path]
    rest: Sequence[str]
    settings: Mapping[str, Any]

    def place(self, name: str) -> str:
        """The option, or the file and the dotted setting, that ends in a name; empty where there is none.

        Args:
            name: of a setting, or the last parts of it.
        """
        options = [argument.split("=")[0] for argument in self.rest if argument.startswith("--")]
        if found := next((option for option in options if _ends_in(option[2:], name)), ""):
            return found
        for config, path in reversed(list(self.configs.items())):
            dotted = _dotted(read_config(path), "")
            if found := next((each for each in dotted if _ends_in(each, name)), ""):
                return f"{found} in {config}"
        return ""

    def names_at(self, place: str) -> set[str]:
        """Names of the arguments beside a setting.

        Args:
            place: as ``place`` gives it.
        """
        parts = place.partition(" in ")[0].removeprefix("--").replace(f"{_INIT}.", "").split(".")
        value: Any = self.settings
        for part in parts[:-1]:
            value = value.get(part) or (value.get(_INIT) or {}).get(part) if isinstance(value, Mapping) else None
        path = value.get("class_path") if isinstance(value, Mapping) else None
        if not isinstance(path, str) or "." not in path:
            return set()
        return {*inspect.signature(pkgutil.resolve_name(path)).parameters} - {*FROM_DATA, "self"}


def _ends_in(dotted: str, name: str) -> bool:
    plain = dotted.replace(f"{_INIT}.", "")
    return any(each == name or each.endswith(f".{name}") for each in (dotted, plain))


def _dotted(value: Any, prefix: str) -> Iterator[str]:
    """Every key below a mapping, by its dotted place without ``init_args``."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if key == _INIT:
            yield from _dotted(inner, prefix)
        else:
            yield f"{prefix}{key}"
            yield from _dotted(inner, f"{prefix}{key}.")


def check_shape(settings: Mapping[str, Any], given: Given) -> None:
    """Refuse settings that have the wrong shape, which jsonargparse would describe in pages.

    Args:
        settings: of the configurations.
        given: for the place.

    Raises:
        ACKDError: naming the setting.
    """
    for section in ("model", "data", "trainer"):
        value = settings.get(section)
        if value is not None and not isinstance(value, Mapping | str):
            raise ACKDError(_wrong(section, value, "settings, each on its line below it", given))
        if section == "trainer" and isinstance(value, str):
            raise ACKDError(_wrong(section, value, "settings, each on its line below it", given))
        if section != "trainer":
            _check_class(value, section, given)


def _check_class(value: Any, place: str, given: Given) -> None:
    if not isinstance(value, Mapping) or not {"class_path", _INIT} & set(value):
        return
    if "class_path" in value and not isinstance(value["class_path"], str):
        raise ACKDError(_wrong(f"{place}.class_path", value["class_path"], "the name of a class", given))
    for key in value:
        if key not in _OF_A_CLASS:
            raise ACKDError(_unknown(str(key), f"{place}.{key}", _OF_A_CLASS, given))
    arguments = value.get(_INIT)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ACKDError(_wrong(f"{place}.{_INIT}", arguments, "settings, each on its line below it", given))
    for name, inner in (arguments or {}).items():
        _check_class(inner, f"{place}.{name}", given)


def _in_brackets(place: str) -> str:
    return f" ({place})" if place else ""


def _wrong(place: str, value: Any, kind: str, given: Given) -> str:
    short = place.removesuffix(f".{_INIT}")
    return f"setting {place} is {str(value)[:80]!r}; it must be {kind}{_in_brackets(given.place(short))}"


def _unknown(name: str, place: str, valid: Iterable[str], given: Given) -> str:
    found = given.place(place)
    own = given.names_at(found)
    last, everything = name.rpartition(".")[2], sorted(map(str, valid))
    hint = near_matches(last, own) if own else ""
    if not hint.startswith("did"):
        wider = near_matches(name, everything)
        hint = wider if wider.startswith("did") or not hint else hint
    return f"there is no setting {name!r} here; {hint}{_in_brackets(found)}"


def refused_by_trainer(error: Exception, names: Iterable[str]) -> str:
    """What Lightning's Trainer has to say against its settings, in one sentence.

    Args:
        error: of its constructor.
        names: of its arguments.
    """
    if (ours := deepest(error)) is not None:
        return str(ours)
    text = " ".join(str(error).split())
    if "backend found" in text:
        return "trainer.accelerator is gpu and this machine has no GPU that torch can use; leave it out, or use cpu"
    named = next((name for name in names if re.search(rf"\b{name}\b", text)), "")
    return (
        f"Lightning's Trainer refuses its settings: {text[:300].rstrip('.')}; change trainer{'.' * bool(named)}{named}"
    )


def shorten(message: str, valid: Iterable[str], given: Given) -> str:
    """Turn jsonargparse's account of an error into one sentence with the nearest valid name.

    Args:
        message: as jsonargparse words it, up to hundreds of lines.
        valid: the settings that are known at that place.
        given: where settings come from.
    """
    text = " ".join(message.split())
    unknown = re.search(r"NestedArg\(key='([^']+)'", text)
    unknown = unknown or re.search(r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)", text)
    unknown = unknown or re.search(r"does not accept option '([^']+)'", text)
    unknown = unknown or re.search(r"[Uu]nrecognized arguments?: -*([\w.-]+)", text)
    if unknown and unknown[1] in FROM_DATA:
        return f"{unknown[1]} is read off the data and cannot be set; leave it out"
    if unknown:
        return _unknown(unknown[1], unknown[1], valid, given)
    if required := re.search(r"arguments are required: (.+)", text):
        names = re.sub(r"\b(fit|validate|test|predict)\.", "", required[1])
        if command := re.match(r"(validate|test|predict)\.", required[1]):
            return f"{names} missing; write `ackd {command[1]} RUN`, or name the settings with --config"
        return f"{names} missing; name a configuration with --config (`ackd configs` lists them), or set it"
    if re.search(r"expected one argument", text):
        options = [option for option, then in _pairs(given.rest) if then is None or then.startswith("--")]
        named = re.search(r"argument (--[\w.]+)", text)
        option = next((each for each in options if "=" not in each), named[1] if named else "an option")
        return f"{option} has no value; write one behind it"
    key = re.search(r'Parser key "([^"]+)"', text)
    value = re.search(r"(?:Given value|Got value): (.{1,80})", text)
    expected = list(dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\.? Got value| - | Given value|$)", text)))
    if key and "Unable to load config" in text:
        return f"setting {key[1]} is no settings; set {key[1]}.NAME, or name a file of settings"
    if key:
        plain = (re.sub(r"typing\.|<class '([\w.]+)'>", r"\1", each) for each in expected)
        kinds = [re.sub(r"Literal\[(.*)\]", r"\1", each) for each in plain if each != "NoneType"]
        classes = [each for each in kinds if each.startswith(("path but", "dot import", "one of: - a class"))]
        kinds = [_TYPES.get(each, each) for each in kinds if each not in classes]
        kinds += [_CLASS] * bool(classes or not kinds)
        shown = f" is {value[1]!r}" if value else ""
        return f"setting {key[1]}{shown}; it must be {' or '.join(kinds)[:300]}{_in_brackets(given.place(key[1]))}"
    return text[:400]


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """Options with what stands behind them."""
    following = [*arguments[1:], None]
    return [(each, then) for each, then in zip(arguments, following, strict=True) if each.startswith("--")]


def deepest(error: BaseException | None) -> ACKDError | None:
    """The first sentence of ours that led to an error.

    Args:
        error: the last of a chain.
    """
    found: ACKDError | None = None
    while error is not None:
        if isinstance(error, ACKDError):
            found = error
        error = error.__cause__ or error.__context__
    return found


def split_configs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take every ``--config VALUE`` out of a command line.

    Args:
        arguments: behind the subcommand.

    Returns:
        The values in order, and the other arguments.
    """
    configs: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument in ("--config", "-c"):
            value = next(waiting, None)
            if value is None:
                raise ACKDError("--config needs a value; `ackd configs` lists the packaged ones")
            configs.append(value)
        elif argument.startswith("--config="):
            configs.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return configs, rest


def name_checkpoint(configs: list[str], rest: list[str]) -> tuple[list[str], list[str]]:
    """Let ``ackd test RUN [--which best]`` stand for the run's own settings and checkpoint.

    Args:
        configs: already named.
        rest: of the command line.
    """
    which, run, others = "last", "", []
    waiting = iter(rest)
    for argument in waiting:
        if argument == "--which" or argument.startswith("--which="):
            which = argument.partition("=")[2] or next(waiting, "")
        elif argument.startswith("-"):
            others += [argument] if "=" in argument else [argument, *itertools.islice(waiting, 1)]
        else:
            run = argument
    if which not in ("last", "best"):
        raise ACKDError(f"--which is {which!r}; it must be last or best")
    if not run and not configs and "--ckpt_path" in others:
        place = others.index("--ckpt_path")
        run, others = others[place + 1], [*others[:place], *others[place + 2 :]]
    if run:
        checkpoint = find_checkpoint(run, cast("Any", which))
        folder = run_folder(checkpoint)
        if not (folder / "config.yaml").is_file():
            raise ACKDError(f"{folder} has no config.yaml beside its checkpoints; name the settings with --config")
        others = ["--ckpt_path", str(checkpoint), *others]
        configs = [str(folder / "config.yaml"), *configs]
    return configs, others


def refuse_linked(settings: dict[str, Any], rest: Sequence[str]) -> None:
    """Say so when a setting is given to the model that it takes from the data.

    Args:
        settings: of the configurations.
        rest: of the command line.

    Raises:
        ACKDError: naming the setting.
    """
    model = settings.get("model")
    arguments = model.get("init_args", {}) if isinstance(model, dict) else {}
    given = [argument.lstrip("-").split("=")[0].replace("init_args.", "") for argument in rest]
    for name in FROM_DATA:
        if (isinstance(arguments, dict) and name in arguments) or f"model.{name}" in given:
            raise ACKDError(f"model.{name} is taken from the data; leave it out and choose the data's settings instead")
