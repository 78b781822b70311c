"""Adding an option or a public name is a decision: both are frozen as text.

``python tests/test_options.py`` writes the text again.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden" / "options.txt"
REFRESH = "run `python tests/test_options.py` if this is intended, and add it to the documentation"
PUBLIC = (
    "",
    ".data",
    ".methods",
    ".models",
    ".metrics",
    ".callbacks",
    ".training",
    ".functional",
    ".testing",
    ".types",
)


def of_argparse(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options and positional arguments of a parser, without those of Lightning and of jsonargparse."""
    for action in parser._actions:
        refused = "--print_shtab" in action.option_strings  # hidden; jsonargparse 4.53 refuses it in favour of another
        if not isinstance(action, argparse._SubParsersAction) and not refused:
            for name in action.option_strings or [action.dest]:
                if not name.startswith("--trainer") and not name.endswith((".help", "+")) and "-->" not in name:
                    yield name


def arguments_of(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("self", "args", "kwargs")]


def lines() -> Iterator[str]:
    """The text: one line for each option of each subcommand, then one for each public name."""
    from ackd_lightning import cli
    from ackd_lightning.data import DigitsDataModule
    from ackd_lightning.launch import LIGHTNING
    from ackd_lightning.launch.options import make_parser
    from ackd_lightning.models.student_config import StudentConfig
    from ackd_lightning.models.teacher_config import TeacherConfig
    from ackd_lightning.training import Recipe

    parser = cli.make_parser()
    yield from (f"ackd {name}" for name in of_argparse(parser))
    subcommands: Any = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    for command, sub in subcommands.choices.items():
        found = set(of_argparse(make_parser(command) if command in LIGHTNING else sub))
        if command == "fit":
            found |= {f"--data.{name}" for name in arguments_of(DigitsDataModule)}
            found |= {f"--model.teacher.{name}" for name in arguments_of(TeacherConfig)}
            found |= {f"--model.student.{name}" for name in arguments_of(StudentConfig)}
            found |= {f"--model.recipe.{name}" for name in arguments_of(Recipe)}
        elif command in LIGHTNING:
            found |= set(of_argparse(cli.make_image_parser())) if command == "predict" else set()
            found = {name for name in found if not name.startswith(("--model.", "--data."))}
        yield from (f"ackd {command} {name}" for name in sorted(found))
    for room in PUBLIC:
        module = importlib.import_module(f"ackd_lightning{room}")
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        yield from (f"{module.__name__}.{name}" for name in sorted(names))


def test_options_and_public_names_are_those_that_were_decided():
    before, now = GOLDEN.read_text(encoding="utf-8").splitlines(), list(lines())
    added, removed = sorted({*now} - {*before}), sorted({*before} - {*now})
    if added or removed:
        pytest.fail(f"added: {added}; removed: {removed}; {REFRESH}", pytrace=False)
    assert before == now


def test_every_option_has_a_help_text():
    from ackd_lightning import cli
    from ackd_lightning.launch import LIGHTNING
    from ackd_lightning.launch.options import make_parser

    subcommands: Any = next(each for each in cli.make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    parsers = [
        *(sub for name, sub in subcommands.choices.items() if name not in LIGHTNING),
        *map(make_parser, LIGHTNING),
        cli.make_image_parser(),
    ]
    silent = [
        action.option_strings or action.dest
        for parser in parsers
        for action in parser._actions
        if not action.help and not (action.option_strings and action.option_strings[0].startswith("--trainer."))
    ]
    assert silent == []


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(lines()) + "\n", encoding="utf-8")
