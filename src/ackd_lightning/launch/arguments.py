"""Read a command line: which configurations and which classes it names."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ackd_lightning.config.files import long_form, merge, of_torch, walk
from ackd_lightning.config.yaml_files import parse_yaml
from ackd_lightning.errors import ACKDError, count_of

_INIT = "init_args"
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_LENGTHS = {"CosineAnnealingLR": "T_max", "PolynomialLR": "total_iters", "OneCycleLR": "total_steps"}
"""Schedulers that have to know how long a fit is, and the argument that tells them."""


def split_configs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take every ``--config VALUE`` out of a command line.

    Args:
        arguments: Command line after the subcommand.

    Returns:
        Values in order, and the other arguments.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", nargs="?", default=[])
    found, rest = parser.parse_known_args(arguments)
    if None in found.config:
        raise ACKDError("--config needs a value; `ackd configs` lists the packaged configurations")
    return found.config, rest


def refuse_values_alone(options: Sequence[str]) -> None:
    """Refuse what is neither an option nor the value of one.

    Args:
        options: Command line without ``--config`` and the name of a run.

    Raises:
        ACKDError: Naming it, and how it is meant to be written.
    """
    for name, _ in option_pairs(options):
        if name.startswith("-"):
            continue
        if name.endswith((".yaml", ".yml")):
            remedy = f"write --config {name}"
        elif any(each.startswith(f"{name}=") for each in options):
            remedy = "write the whole name of the setting after two dashes, such as --model.optimizer.lr=0.1"
        else:
            remedy = "write the option that it belongs to before it, such as --name first"
        raise ACKDError(f"{name!r} is given without an option; {remedy}")


def without_none(options: Sequence[str]) -> list[str]:
    """Replace the value ``None``, as Python programs such as sweeps print it, by ``null``.

    Args:
        options: Command line without ``--config``.

    Examples:
        >>> without_none(["--data.max_per_class=None", "--model.student.weights", "None", "--name=Nonesuch"])
        ['--data.max_per_class=null', '--model.student.weights', 'null', '--name=Nonesuch']
    """
    return ["null" if each == "None" else re.sub(r"^(--[^=]+)=None$", r"\1=null", each) for each in options]


def choose_classes(settings: dict[str, Any], options: Sequence[str]) -> list[str]:
    """Lay the classes that a command line names over those of the files, and take them out of the command line.

    As between two files, another class drops the arguments of the old one; jsonargparse would keep those that both
    have: AdamW with the learning rate of SGD. A scheduler whose length is not stated gets length 0, which
    ``set_length`` replaces.

    Args:
        settings: Merged content of the files; changed in place.
        options: Command line without ``--config``.

    Returns:
        The other options.
    """
    others: list[str] = []
    _refuse_list_and_part(options)
    waiting = iter(options)
    for option in waiting:
        name, equals, value = option.partition("=")
        if name == "--model.student":
            settings["model"] = {
                **(settings.get("model") or {}),
                "student": _network(value if equals else next(waiting, "")),
            }
            continue
        _refuse_part_of_list(settings, name)
        if name == "--model.teacher":
            text = value if equals else next(waiting, "")
            settings["model"] = {**(settings.get("model") or {})}
            settings["model"].pop("teacher", None)  # a list would inherit from the teacher of the files
            if isinstance(listed := read_value(text), list):  # a later option may change one of them
                settings["model"]["teacher"] = listed
            else:
                others += [option] if equals or not text else [option, text]
            continue
        holder, key = _holder(settings, name)
        if (inside := _element(settings, name)) is not None:
            element, inner = inside
            element[inner] = read_value(value if equals else next(waiting, ""))
            continue
        if key not in holder:
            others.append(option)
            continue
        value = value if equals else next(waiting, "")
        spec = _as_class(value)
        if spec is None:
            others += [option] if equals or not value else [option, value]
        else:
            holder[key] = merge(holder[key] or {}, of_torch(spec, key))
    model = settings.get("model")
    if isinstance(model, dict) and "student" in model:
        model["student"] = long_form(model["student"], "student")
    scheduler = model.get("lr_scheduler") if isinstance(model, dict) else None
    length = _LENGTHS.get(_last_part(scheduler))
    stated = {option.partition("=")[0].rpartition(".")[2] for option in others if "lr_scheduler" in option}
    if isinstance(scheduler, dict) and length and not {length, "epochs"} & {*stated, *(scheduler.get(_INIT) or {})}:
        scheduler[_INIT] = {**(scheduler.get(_INIT) or {}), length: 0}
    return others


def set_length(scheduler: Any, *, epochs: int | None, steps: int, interval: str) -> None:
    """Fill in the length of a scheduler that was not stated: the epochs of the fit.

    The training module fills in what depends on the number of batches: steps, and the epochs of a limit of steps.

    Args:
        scheduler: Parsed ``model.lr_scheduler``; changed in place.
        epochs: ``trainer.max_epochs``.
        steps: ``trainer.max_steps``.
        interval: ``model.recipe.interval``.

    Raises:
        ACKDError: When the length of the fit is not known.
    """
    name = _LENGTHS.get(_last_part(scheduler))
    later = interval == "step" or steps != -1
    if name is None or scheduler[_INIT].get(name) != 0 or (later and name != "total_steps"):
        return
    if epochs is None:
        epochs = 1000  # Lightning's own default
    if epochs < 1 or later:
        raise ACKDError(
            f"model.lr_scheduler.{name} is not set and the length of the fit is not known (trainer.max_epochs is "
            f"{epochs}, trainer.max_steps is {steps}, model.recipe.interval is {interval}); set it"
        )
    scheduler[_INIT][name] = epochs


def renew_length(scheduler: Any, *, before: Any, epochs: Any, steps: int, options: Sequence[str], interval: str) -> str:
    """Let a schedule of the length of the fit follow an option that makes the fit shorter or longer.

    The settings of a run hold the length that the fit had then. A cosine that ends before the fit is told of, since
    its rate rises again.

    Args:
        scheduler: Parsed ``model.lr_scheduler``; changed in place.
        before: ``trainer.max_epochs`` of the files.
        epochs: ``trainer.max_epochs``.
        steps: ``trainer.max_steps``.
        options: Command line without ``--config``.
        interval: ``model.recipe.interval``.

    Returns:
        What was done or what will happen, or nothing.
    """
    name = _LENGTHS.get(_last_part(scheduler))
    if name is None:
        return ""
    length, setting = scheduler[_INIT].get(name), f"model.lr_scheduler.{name}"
    stated = _gives(options, name)
    if not stated and length == before and steps >= 0 and name != "total_steps" and _gives(options, "max_steps"):
        scheduler[_INIT][name] = 0
        return f"{setting} follows trainer.max_steps: {before} -> the epochs of {count_of(steps, 'step')}"
    if not stated and before not in (None, epochs) and length == before:
        scheduler[_INIT][name] = 0
        return f"{setting} follows trainer.max_epochs: {before} -> {epochs}"
    if name == "T_max" and interval == "epoch" and steps == -1 and length and epochs and length != epochs:
        what = f"rises again after epoch {length}" if length < epochs else "does not fall to the end"
        return (
            f"{setting} is {length} and the fit has {epochs} epochs, so the learning rate {what}; --{setting} {epochs} "
            "lets it fall to the end"
        )
    return ""


def _gives(options: Sequence[str], name: str) -> bool:
    return any(name in each for each in options)


def option_pairs(options: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the options of a command line and their values; None for one without a value.

    Args:
        options: Command line.

    Examples:
        >>> list(option_pairs(["--name", "first", "--fast", "--data.batch_size=8"]))
        [('--name', 'first'), ('--fast', None), ('--data.batch_size', '8')]
    """
    position = 0
    while position < len(options):
        name, equals, value = options[position].partition("=")
        alone = not equals and (position + 1 == len(options) or options[position + 1].startswith("--"))
        yield name, value if equals else None if alone else options[position + 1]
        position += 1 if equals or alone else 2


def plain_name(option: str) -> str:
    """Return the dotted name of the setting that an option sets, ``init_args`` left out.

    Args:
        option: Option, such as ``--data.init_args.root``.

    Examples:
        >>> plain_name("--data.init_args.root")
        'data.root'
    """
    return option.removeprefix("--").replace(f"{_INIT}.", "")


def _holder(settings: dict[str, Any], option: str) -> tuple[dict[str, Any], str]:
    """The mapping and the key of the class in the settings that an option may replace; an empty mapping for none."""
    name = plain_name(option.removesuffix(".class_path"))
    parent, _, key = name.rpartition(".")
    holder = dict(walk(settings)).get(parent) if parent else settings
    if isinstance(holder, dict) and isinstance(holder.get(_INIT), dict):
        holder = holder[_INIT]
    value = holder.get(key) if isinstance(holder, dict) else None
    is_class = (
        bool({"class_path", _INIT} & set(value)) if isinstance(value, dict) else value is None and key == "lr_scheduler"
    )
    return (holder, key) if is_class and isinstance(holder, dict) and option.startswith("--") else ({}, key)


def _element(settings: dict[str, Any], option: str) -> tuple[dict[str, Any], str] | None:
    """The mapping and the key that an option such as ``--model.method.methods.0.temperature`` sets; None for others.

    Raises:
        ACKDError: When the list has no element of that number.
    """
    *parents, key = plain_name(option).split(".")
    if not any(map(str.isdecimal, parents)):
        return None
    value: Any = settings
    for number, part in enumerate(parents):
        if isinstance(value, dict) and "class_path" in value and part != "class_path":
            value = value.setdefault(_INIT, {}) or {}
        if isinstance(value, list) and part.isdecimal():
            if int(part) >= len(value):
                place = ".".join(parents[:number])
                raise ACKDError(
                    f"{option} is given and {place} has {len(value)} elements; use a number from 0 to {len(value) - 1}"
                )
            if isinstance(value[int(part)], str):  # a name alone
                value[int(part)] = {"network" if parents[number - 1] == "teacher" else "class_path": value[int(part)]}
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return None
    if not isinstance(value, dict):
        return None
    if "class_path" in value and key != "class_path":
        value[_INIT] = value.get(_INIT) or {}
        value = value[_INIT]
    return value, key


def _refuse_list_and_part(options: Sequence[str]) -> None:
    """Refuse a whole list beside an option for one of its elements, which it would replace; teachers go in order."""
    names = [plain_name(name) for name, _ in option_pairs(options) if name.startswith("--")]
    for name in names:
        for place in {*names} - {"model.teacher"}:
            if name.startswith(f"{place}.") and name[len(place) + 1 :].partition(".")[0].isdecimal():
                raise ACKDError(f"--{place} and --{name} are given; write the value into the list")


def _refuse_part_of_list(settings: dict[str, Any], option: str) -> None:
    """Refuse an option such as ``--model.teacher.gate`` where the settings list several teachers."""
    value: Any = settings
    parts = plain_name(option).split(".")
    for number, part in enumerate(parts):
        if isinstance(value, list) and not part.isdecimal():
            place, rest = ".".join(parts[:number]), ".".join(parts[number:])
            raise ACKDError(
                f"{option} is given and {place} is a list of {len(value)}; say for which of them, as in "
                f"--{place}.0.{rest}"
            )
        if isinstance(value, dict) and isinstance(value.get(_INIT), dict):
            value = value[_INIT]
        if not isinstance(value, dict) or part not in value:
            return
        value = value[part]


def read_value(value: str) -> Any:
    """Read a value as YAML does; text that is a number to Python, such as 1e-3, is one.

    Args:
        value: Value of an option.
    """
    try:
        read = parse_yaml(value)
    except Exception:  # whatever PyYAML's constructors raise
        return value
    if "#" in value and (read is None or isinstance(read, str)) and read != value.strip("'\""):
        return value  # what follows a # is no comment
    return as_number(read)


def as_number(read: Any) -> Any:
    """Return a value of YAML, where 1e-3 without a point is text, as the command line reads it.

    Args:
        read: Value that YAML has read.
    """
    with contextlib.suppress(ValueError):
        return float(read) if isinstance(read, str) else read
    return read


def _network(value: str) -> Any:
    """A student as it was written: its name, or a mapping."""
    try:
        read = parse_yaml(value)
    except Exception:  # whatever PyYAML's constructors raise
        return value
    return read if isinstance(read, dict) else value


def _as_class(value: str) -> dict[str, Any] | None:
    """A class that was written as its name or as a mapping; None for anything else."""
    try:
        read = parse_yaml(value)
    except Exception:  # whatever PyYAML's constructors raise
        return None
    if isinstance(read, str) and _NAME.fullmatch(read):
        return {"class_path": read}
    return read if isinstance(read, dict) and isinstance(read.get("class_path"), str) else None


def _last_part(spec: Any) -> str:
    """Name of the class of a setting without its package."""
    return str(spec["class_path"]).rpartition(".")[2] if spec is not None and "class_path" in spec else ""
