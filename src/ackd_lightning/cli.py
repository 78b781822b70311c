"""The command ``ackd``. Torch is imported only by the commands that need it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ackd_lightning._version import __version__
from ackd_lightning.errors import ACKDError, RunFinishedError, RunsFailedError, RunStoppedError, near_matches

_LIGHTNING = {
    "fit": "train a student or a teacher: ackd fit --config cifar100_resnet110_resnet20.yaml",
    "validate": "evaluate a run on its validation data: ackd validate RUN",
    "test": "evaluate a run on the test set, once: ackd test RUN [--which best]",
    "predict": "write a run's predictions as CSV: ackd predict RUN [--output FILE]",
}


class _Parser(argparse.ArgumentParser):
    """Errors in one sentence, and no abbreviations: a mistyped option must not become another one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage."""
        raise ACKDError(f"{self.prog}: {message}; `{self.prog} --help` explains")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ackd",
        description="Knowledge distillation on PyTorch Lightning.",
        epilog="`ackd COMMAND --help` explains a command; `ackd fit --config NAME --print_config` lists every setting.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ackd-lightning {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _LIGHTNING.items():
        commands.add_parser(name, help=text, add_help=False)
    configs = commands.add_parser("configs", help="list the packaged configurations")
    configs.add_argument("filter", nargs="?", default="", help="show only names that contain this")
    export = commands.add_parser("export", help="take the plain student out of a run: ackd export RUN")
    export.add_argument("run", help="a run folder or a checkpoint")
    export.add_argument("--format", choices=["safetensors"], default="safetensors", help="of the file")
    export.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint of a run folder")
    export.add_argument(
        "--learner", type=int, default=0, help="0: the target learner; from 1: a peer that was trained beside it"
    )
    export.add_argument("--out", default=None, help="the file; default: student-WHICH.safetensors in the run's folder")
    export.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    compare = commands.add_parser("compare", help="one table and one figure over runs: ackd compare RUN RUN ...")
    compare.add_argument("runs", nargs="+", help="run folders, or folders of runs")
    compare.add_argument("--figure", default="curves.png", help="where the validation curves are drawn")
    demo = commands.add_parser("demo", help="teacher, student alone, KD and ACKD on digits, in minutes on a CPU")
    demo.add_argument("--out", default="demo", help="folder for runs, figure and student")
    demo.add_argument("--seeds", type=int, default=3, help="students per method")
    demo.add_argument("--epochs", type=int, default=None, help="of every run; for a quick look")
    again = commands.add_parser(
        "reproduce",
        help="train what a table of the paper needs, and print it: ackd reproduce table2 --pair resnet110_resnet20",
        epilog="Any other option is a setting of `ackd fit` for every run, such as --trainer.max_epochs 60.",
        allow_abbrev=False,
    )
    again.add_argument("table", help="table1 .. table7, all, or a file like configs/tables/table2.yaml")
    again.add_argument("--pair", default="", help="pairs of the table, separated by commas; default: all")
    again.add_argument("--methods", default="", help="rows or methods, separated by commas; default: all rows")
    again.add_argument("--seeds", default="3", help="how many (3 means 0, 1, 2) or which (0,5)")
    again.add_argument("--out", default=None, help="folder of runs and tables; default: reproduce/TABLE")
    again.add_argument("--preset", choices=["smoke"], default=None, help="smoke: the same rows on digits, in minutes")
    again.add_argument("--dry-run", action="store_true", help="print the runs with an estimate of time and disk")
    again.add_argument("--workers", type=int, default=None, help="runs at a time; default: one for each GPU")
    speed = commands.add_parser(
        "bench",
        help="training speed, where the time goes, memory: ackd bench --config NAME --methods kd,ackd",
        epilog="Any other option is a setting of `ackd fit`, such as --data.batch_size 64.",
        allow_abbrev=False,
    )
    speed.add_argument("--config", action="append", default=[], help="as for `ackd fit`")
    speed.add_argument("--methods", default="", help="separated by commas; default: the configuration's own")
    speed.add_argument("--steps", type=int, default=20, help="that are timed in every run")
    speed.add_argument("--warmup", type=int, default=5, help="steps before them")
    speed.add_argument("--runs", type=int, default=5, help="fresh processes for each method, methods in turn")
    speed.add_argument("--out", default=None, help="file for all numbers as JSON; -: to the screen, without the table")
    keep = commands.add_parser(
        "cache",
        help="run a teacher once over every view of a training, for all runs that share it",
        epilog="Any other option is one of the `ackd fit` that is to read the cache: --config, --data.seed, ...",
        allow_abbrev=False,
    )
    keep.add_argument("--out", default="teacher-cache", help="folder of the cache")
    keep.add_argument("--estimate", action="store_true", help="print what it would take and save; write nothing")
    return parser


def _configs(part: str) -> None:
    from ackd_lightning.config.files import describe_config, method_names, packaged_names

    print("runs (ackd fit --config NAME):")
    width = max(map(len, packaged_names()))
    for name in packaged_names():
        if part in name:
            print(f"  {name:<{width}}  {describe_config(name)}")
    print("methods (a second --config swaps the method and keeps pair, data and schedule):")
    for name in method_names():
        print(f"  {name:<{width}}  {describe_config(name)}")


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _run(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] in _LIGHTNING:
        from ackd_lightning.launch.execute import run

        return run(arguments[0], arguments[1:])
    parser = _parser()
    if not arguments:
        return parser.print_help()
    commands = [*_LIGHTNING, "configs", "export", "compare", "demo", "reproduce", "bench", "cache"]
    if not arguments[0].startswith("-") and arguments[0] not in commands:
        raise ACKDError(f"{arguments[0]!r} is no command; {near_matches(arguments[0], commands)}")
    chosen, others = parser.parse_known_args(arguments)
    if others and chosen.command not in ("reproduce", "bench", "cache"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if chosen.command == "configs":
        _configs(chosen.filter)
    elif chosen.command == "export":
        from ackd_lightning.commands.export import export_command

        export_command(
            chosen.run, which=chosen.which, out=chosen.out, overwrite=chosen.overwrite, learner=chosen.learner
        )
    elif chosen.command == "compare":
        from ackd_lightning.commands.compare import compare_command

        compare_command(chosen.runs, chosen.figure)
    elif chosen.command == "demo":
        from ackd_lightning.commands.demo import demo

        demo(chosen.out, seeds=chosen.seeds, epochs=chosen.epochs)
    elif chosen.command == "reproduce":
        from ackd_lightning.commands.reproduce import reproduce

        reproduce(
            chosen.table,
            pairs=_names(chosen.pair),
            methods=_names(chosen.methods),
            seeds=chosen.seeds,
            out=chosen.out,
            preset=chosen.preset,
            dry_run=chosen.dry_run,
            workers=chosen.workers,
            overrides=others,
        )
    elif chosen.command == "cache":
        from ackd_lightning.commands.cache import cache

        cache(others, out=chosen.out, estimate=chosen.estimate)
    elif chosen.command == "bench":
        from ackd_lightning.bench.command import bench

        bench(
            chosen.config,
            methods=_names(chosen.methods),
            steps=chosen.steps,
            warmup=chosen.warmup,
            runs=chosen.runs,
            out=chosen.out,
            overrides=others,
        )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        arguments: without the program's name; None: those of the process.

    Returns:
        0; 2 for a mistake in the input; 1 for a failure while running; 130 and 143 after Ctrl-C and SIGTERM.
    """
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        if os.environ.get("ACKD_DEBUG"):
            raise
        if isinstance(error, RunFinishedError):
            print(f"ackd: {error}")
            return 0
        if isinstance(error, ACKDError):
            print(f"ackd: {error}", file=sys.stderr)
            return 2
        if isinstance(error, RunsFailedError):
            print(f"ackd: {error}", file=sys.stderr)
            return 1
        first = (str(error).splitlines() or [""])[0]
        print(f"ackd: {type(error).__name__}: {first} (ACKD_DEBUG=1 shows where)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ackd: interrupted", file=sys.stderr)
        return 130
    except RunStoppedError as end:
        print(f"ackd: {end.sentence}", file=sys.stderr)
        return int(end.code or 0)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit(1)
            print(
                "ackd: interrupted; --resume auto goes on from the last whole epoch",
                file=sys.stderr,
            )
            return 130
        if type(end).__name__ == "SIGTERMException":  # Lightning's, which would exit with 0
            print("ackd: terminated", file=sys.stderr)
            return 143
        raise
    return 0


def script() -> None:
    """Console script: exits with what ``main`` returns."""
    sys.exit(main())
