"""Completion of command lines in bash, zsh and fish; without torch, as it runs at every press of the Tab key."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ackd_lightning.config.files import config_folder, method_names, packaged_names, recipe_names
from ackd_lightning.launch import LIGHTNING
from ackd_lightning.launch.short_help import options_of

_RUN = {"run", "runs", "network"}
_DEEPEST = 4
"""Levels of folders below the current one in which runs are looked for."""
_MOST_FOLDERS = 2000

_SCRIPTS = {
    "bash": """\
_ackd() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        printf -v line '%q' "$line"
        COMPREPLY+=("$line")
    done < <("${COMP_WORDS[0]}" completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -o bashdefault -F _ackd ackd
""",
    "zsh": """\
#compdef ackd
_ackd() {
    local -a found
    found=("${(@f)$("${words[1]}" completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then compadd -a found; else _files; fi
}
compdef _ackd ackd
""",
    "fish": """\
function __ackd_complete
    set -l given (commandline -opc) (commandline -ct)
    $given[1] completion --words $given[2..-1] 2>/dev/null
end
complete -c ackd -a '(__ackd_complete)'
""",
}


def completion(shell: str) -> None:
    """Print the script that makes a shell complete command lines of ``ackd``.

    Args:
        shell: ``bash``, ``zsh`` or ``fish``.
    """
    print(_SCRIPTS[shell], end="")


def candidates(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Return what the last word of a command line may become; nothing where only files fit.

    Args:
        parser: Parser of the subcommands.
        words: Command line after ``ackd``; the last word is the one that is completed and may be empty.
    """
    *before, word = words or [""]
    if not before:
        found: Iterable[str] = [*_commands(parser), "--help", "--version"]
    elif before[0] not in _commands(parser):
        found = []
    else:
        found = _of_command(before[0], _commands(parser)[before[0]], before[1:], word)
    return sorted({each for each in found if each.startswith(word)})


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    groups = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(next(groups).choices)


def _of_command(command: str, parser: argparse.ArgumentParser, before: Sequence[str], word: str) -> Iterable[str]:
    values = _values(command, parser)
    last = before[-1] if before else ""
    if last in ("-c", "--config"):
        return _configs(word)
    if last == "--resume":
        return ["auto", *_runs()]
    if last.startswith("--") and last in values and values[last] is not None:
        return values[last] or []
    if word.startswith("-"):
        return values
    if command in LIGHTNING and command != "fit":
        return [] if before else _runs()
    positional = next((each for each in parser._actions if not each.option_strings), None)
    if positional is None:
        return []
    if positional.dest in _RUN:
        return _runs()
    if positional.dest == "table":
        return ["all", *(path.stem for path in (config_folder() / "tables").glob("table*.yaml"))]
    return [str(each) for each in positional.choices or []]


def _values(command: str, parser: argparse.ArgumentParser) -> dict[str, list[str] | None]:
    """Options of a command: their values, an empty list for free ones, and None for switches."""
    if command in LIGHTNING:
        return options_of(command)
    found: dict[str, list[str] | None] = {}
    for action in parser._actions:
        for name in action.option_strings:
            found[name] = None if action.nargs == 0 else [str(each) for each in action.choices or []]
    takes_configs = command in ("cache", "report", "tune")
    return {**found, "--config": []} if takes_configs else found


def _configs(word: str) -> Iterable[str]:
    """Packaged configurations, methods and recipes, and files in the folder of a path."""
    folder = Path(word).parent if "/" in word else Path()
    prefix = "" if folder == Path() else f"{folder}/"
    yield from (f"{prefix}{path.name}" for path in folder.glob("*.yaml"))
    yield from (*packaged_names(), *method_names(), *(f"recipes/{name}" for name in recipe_names()))


def _runs() -> Iterable[str]:
    """Folders of runs below the current folder."""
    for seen, (place, folders, files) in enumerate(os.walk(".")):
        path = Path(place)
        if "config.yaml" in files and ("metrics.csv" in files or "checkpoints" in folders):
            folders.clear()
            yield str(path)
        folders[:] = [each for each in folders if not each.startswith(".")]
        if len(path.parts) >= _DEEPEST or seen > _MOST_FOLDERS:
            folders.clear()
