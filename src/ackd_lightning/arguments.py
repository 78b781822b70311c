"""Reading a command line: which configurations, which run, and errors in one sentence."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.export import find_checkpoint, run_folder

FROM_DATA = ("num_classes", "input_size", "mean", "std")
"""What the model takes from the data, and no setting may say otherwise."""


def shorten(message: str, valid: Iterable[str]) -> str:
    """Turn jsonargparse's account of an error into one sentence with the nearest valid name.

    Args:
        message: as jsonargparse words it, up to hundreds of lines.
        valid: the settings that are known at that place.
    """
    text = " ".join(message.split())
    unknown = re.search(r"NestedArg\(key='([^']+)'", text)
    unknown = unknown or re.search(r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)", text)
    unknown = unknown or re.search(r"[Uu]nrecognized arguments?: -*([\w.]+)", text)
    if unknown and unknown[1] in FROM_DATA:
        return f"{unknown[1]} is read off the data and cannot be set; leave it out"
    if unknown:
        return f"there is no setting {unknown[1]!r} here; {near_matches(unknown[1], valid)}"
    key = re.search(r'Parser key "([^"]+)"', text)
    value = re.search(r"(?:Given value|Got value): (.{1,80})", text)
    expected = list(dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\.? Got value| - | Given value|$)", text)))
    if key and expected:
        plain = (re.sub(r"typing\.|<class '([\w.]+)'>", r"\1", each) for each in expected)
        kinds = " or ".join(re.sub(r"Literal\[(.*)\]", r"\1", each) for each in plain if each != "NoneType")
        given = f" is {value[1]!r}" if value else ""
        return f"setting {key[1]}{given}; it must be {kinds}"[:400]
    return text[:400]


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
