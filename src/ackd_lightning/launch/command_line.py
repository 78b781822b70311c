"""What is done with a command line and its folder before a command is chosen; nothing here needs torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ackd_lightning.errors import ACKDError

_WITH_VALUE = ("--config", "-c")


def find_own_classes() -> None:
    """Let settings name classes in files of the working folder.

    Raises:
        ACKDError: If the folder has been removed.
    """
    try:
        here = str(Path.cwd())
    except FileNotFoundError:
        raise ACKDError("the current folder no longer exists; change to another one") from None
    if not {"", here} & set(sys.path):
        sys.path.append(here)


def with_values(arguments: Sequence[str]) -> list[str]:
    """Join settings with their values, so that a value is not taken for the run or the file that a command is about.

    Args:
        arguments: Command line.

    Examples:
        >>> with_values(["export", "--data.root", "photos", "RUN", "--format", "onnx", "-c", "a.yaml"])
        ['export', '--data.root=photos', 'RUN', '--format', 'onnx', '--config=a.yaml']
    """
    found: list[str] = []
    waiting = list(reversed(arguments))
    while waiting:
        name = waiting.pop()
        setting = name in _WITH_VALUE or (name.startswith("--") and "." in name)
        if setting and "=" not in name and waiting and not waiting[-1].startswith("--"):
            name = f"{'--config' if name == '-c' else name}={waiting.pop()}"
        found.append(name)
    return found


def command_after(arguments: Sequence[str] | None) -> str:
    """Say how a command that was broken off goes on: a fit resumes its run.

    Args:
        arguments: Command line of ``ackd``; None for that of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    resumes = arguments[:1] != ["fit"] or any(each.partition("=")[0] == "--resume" for each in arguments)
    return "run the same command again" + ("" if resumes else " with --resume auto")
