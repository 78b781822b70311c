"""The command ``ackd``: options of its subcommands and exit codes. Torch is imported only by commands that need it."""

from __future__ import annotations

import argparse
import errno
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ackd_lightning._version import __version__
from ackd_lightning.config.home import expand_home
from ackd_lightning.errors import (
    NOT_PERMITTED,
    ACKDError,
    NotReadyError,
    NotWrittenError,
    RunFinishedError,
    RunsFailedError,
    RunStoppedError,
    UnreadableImagesError,
    near_matches,
    not_permitted,
)
from ackd_lightning.launch import LIGHTNING
from ackd_lightning.launch.command_line import command_after, find_own_classes, with_values
from ackd_lightning.launch.short_help import asks_for_help, short_help
from ackd_lightning.launch.signals import ended_by_signals
from ackd_lightning.launch.streams import outlive_readers, print_log

_COMMANDS = {
    "doctor": "doctor:doctor",
    "init": "init.command:init",
    "completion": "completion:completion",
    "configs": "configs:configs",
    "inspect": "inspect:inspect",
    "export": "export:export_command",
    "push": "push:push_command",
    "compare": "compare:compare_command",
    "report": "report:report_command",
    "demo": "demo:demo",
    "reproduce": "reproduce.command:reproduce",
    "tune": "tune.command:tune",
    "cache": "cache:cache",
}
"""Functions below ``ackd_lightning.commands``. They take positional arguments by position, options by name."""
_PASS_ON = {
    "reproduce": "overrides",
    "cache": "arguments",
    "inspect": "options",
    "export": "options",
    "push": "options",
    "report": "settings",
    "tune": "settings",
}
"""Commands that pass unknown options on to a command of Lightning, and the argument that takes them."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a file that can take no more."""
_LOST = re.compile(r"gloo.*Connection (closed|reset) by peer|NCCL.*remote process exited", re.DOTALL)
"""What torch says in the processes that are left when one of several has ended."""


class _Parser(argparse.ArgumentParser):
    """Errors in one sentence, and no abbreviations: a mistyped option must not become another one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing usage."""
        raise ACKDError(f"{message}; see `{self.prog} --help`")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all subcommands; those of Lightning parse their own options."""
    parser = _Parser(
        prog="ackd",
        description="Knowledge distillation on PyTorch Lightning.",
        epilog="`ackd COMMAND --help` explains a command; `ackd fit --config NAME --print_config` lists every setting.",
    )
    parser.add_argument("--version", action="version", version=f"ackd-lightning {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in LIGHTNING.items():
        commands.add_parser(name, help=text, add_help=False)

    doctor = commands.add_parser(
        "doctor", help="versions, devices and extras, and whether training works here (exit code 1 if not)"
    )
    doctor.add_argument("--json", dest="as_json", action="store_true", help="print JSON instead of a table")

    start = commands.add_parser(
        "init", help="look at a folder of photos and write configurations of a teacher and a student: ackd init FOLDER"
    )
    start.add_argument("folder", help="folder of class folders, or with the folders train, test and perhaps val")
    start.add_argument("--out", default=".", help="folder of the new files")
    start.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_false",
        help="train the teacher from scratch, so that nothing is downloaded",
    )
    start.add_argument("--overwrite", action="store_true", help="replace files of an earlier call")
    for part in ("train", "val", "test"):
        start.add_argument(f"--{part}-dir", help=f"folder in FOLDER with the {part} images; default: by its name")

    shells = commands.add_parser(
        "completion", help='complete command lines by the Tab key: eval "$(ackd completion bash)" in ~/.bashrc'
    )
    shells.add_argument("shell", choices=["bash", "zsh", "fish"], help="shell whose script is printed")

    configs = commands.add_parser("configs", help="list the packaged configurations")
    configs.add_argument("filter", nargs="?", default="", help="show only names that contain this text")

    look = commands.add_parser(
        "inspect",
        help="what a file or a run is, or stages, branch points and cost of a network: ackd inspect timm:lcnet_050",
        epilog="Options of a network begin with --options, such as --options.img_size 64 for a ViT of timm.",
    )
    look.add_argument("network", help="exported file, run, or network: of the zoo, torchvision, timm:NAME, hf:FOLDER")
    look.add_argument("--size", help="image side in pixels, or HEIGHTxWIDTH; default: the network's own")
    look.add_argument("--classes", type=int, help="number of classes; default: 1000")
    look.add_argument("--taps", default="", help="modules whose outputs are the stages, separated by commas")

    export = commands.add_parser(
        "export",
        help="write the plain student of a run, checked on images: ackd export RUN --format onnx,pt2",
        epilog="Options that begin with --data, such as --data.root FOLDER, say where the images of the check are.",
    )
    export.add_argument("run", help="run folder or checkpoint")
    export.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint of a run folder")
    export.add_argument(
        "--learner", type=int, default=0, help="0: the student; from 1: a peer, by its number in the logs"
    )
    export.add_argument(
        "--format",
        dest="formats",
        type=_names,
        default=(),
        help="safetensors, onnx, pt2, pte, openvino, separated by commas; default: that of --out, else safetensors",
    )
    export.add_argument(
        "--dtype", default="float32", help="type of the weights in safetensors: float32, float16 or bfloat16"
    )
    export.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="the network reads uint8 images: conversion and normalisation are in the graph",
    )
    export.add_argument(
        "--check",
        choices=["data", "random"],
        default="data",
        help="images that files are compared on: those of the run's data, or random ones alone",
    )
    export.add_argument(
        "--int8", action="store_true", help="the network computes in int8: onnx, pt2 and pte, calibrated or fine-tuned"
    )
    export.add_argument("--calibrate", type=int, help="training images that --int8 is calibrated on; default: 512")
    export.add_argument(
        "--out",
        help="output file, without an ending for several formats; default: student-WHICH in the run folder",
    )
    export.add_argument("--overwrite", action="store_true", help="replace an existing file")

    push = commands.add_parser(
        "push", help="send the student of a run to the Hugging Face Hub: ackd push RUN USER/NAME"
    )
    push.add_argument("run", help="run folder or checkpoint")
    push.add_argument("repository", help="USER/NAME on the hub; made if it does not exist")
    push.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint of a run folder")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument(
        "--license", dest="license_name", default="unknown", help="licence of the weights, by the hub's name"
    )
    push.add_argument("--check", choices=["data", "random"], default="data", help="images that the file is compared on")

    compare = commands.add_parser("compare", help="one table and one figure over runs: ackd compare RUN RUN ...")
    compare.add_argument("runs", nargs="+", help="run folders, or folders of runs")
    compare.add_argument(
        "--which", choices=["last", "best"], default="last", help="checkpoint whose test predictions are compared"
    )
    compare.add_argument("--against", help="reference, by name or folder; default: first of the network that most have")
    compare.add_argument("--figure", default="comparison.png", help="file for the validation curves")

    report = commands.add_parser(
        "report",
        help="one page about a trained network: accuracy, calibration, mistakes, cost and speed: ackd report RUN",
        epilog="For a file that is not in a run's folder, name its data as for `ackd fit`: --config data/digits.yaml.",
    )
    report.add_argument("run", help="run folder, checkpoint or exported file")
    report.add_argument("--out", help="folder of the page; default: report in the folder of the run")
    report.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint of a run folder")
    report.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="device that predicts")
    report.add_argument("--no-latency", dest="latency", action="store_false", help="leave out the measurement of speed")

    demo = commands.add_parser("demo", help="teacher, student alone, KD and ACKD on digits, in minutes on a CPU")
    demo.add_argument("--out", default="demo", help="folder for runs, figure and student")
    demo.add_argument("--seeds", type=int, default=3, help="number of students per method")
    demo.add_argument("--epochs", type=int, help="epochs of every run, for a quick try")

    again = commands.add_parser(
        "reproduce",
        help="train what a table of the paper needs, and print it: ackd reproduce table2 --pair resnet110_resnet20",
        epilog="Any other option is a setting of `ackd fit` for every run, such as --trainer.max_epochs 60.",
    )
    again.add_argument("table", help="table1 .. table7, all, or a file like configs/tables/table2.yaml")
    again.add_argument(
        "--pair", dest="pairs", type=_names, default=(), help="pairs of the table, separated by commas; default: all"
    )
    again.add_argument(
        "--methods", type=_names, default=(), help="rows or methods, separated by commas; default: all rows"
    )
    again.add_argument("--seeds", default="3", help="number of seeds (3 means 0, 1, 2), or the seeds (0,5 or 3,)")
    again.add_argument("--out", help="folder of runs and tables; default: reproduce/TABLE")
    again.add_argument(
        "--against", metavar="ROW", help="print the difference of every row from this one; default: plain KD"
    )
    again.add_argument("--preset", choices=["smoke"], help="smoke: the same rows on digits, in minutes")
    again.add_argument("--dry-run", action="store_true", help="print the runs with an estimate of time and disk space")
    again.add_argument("--workers", type=int, help="number of parallel runs; default: one per GPU")

    search = commands.add_parser(
        "tune",
        help="choose settings by the validation accuracy of short runs: ackd tune --config NAME --set NAME=VALUES",
        epilog="Any other option is a setting of `ackd fit` for every trial: --config, --data.root FOLDER, ...",
    )
    search.add_argument(
        "--set",
        dest="space",
        action="append",
        required=True,
        metavar="NAME=VALUES",
        help="setting and its values: NAME=0.1,0.5,0.9, a range NAME=0.1:0.9, or NAME=log:0.001:0.1; may be repeated",
    )
    search.add_argument("--trials", type=int, default=20, help="number of trials, with those of earlier calls")
    search.add_argument("--train_fraction", type=float, help="share of the training images; default: the settings'")
    search.add_argument("--epochs", type=int, help="epochs of a trial, to which the schedule is shortened")
    search.add_argument("--out", default="tune", help="folder; the same one goes on where an earlier call stopped")
    search.add_argument("--seed", type=int, default=0, help="seed of the search")
    search.add_argument("--workers", type=int, help="number of parallel runs; default: one per GPU")

    keep = commands.add_parser(
        "cache",
        help="store a teacher's logits for every augmented view of a training, for all runs that share them",
        epilog="Any other option is one of the `ackd fit` that will read the cache: --config, --data.seed, ...",
    )
    keep.add_argument("--out", help="folder of the cache; default: teacher.cache of the settings, else teacher-cache")
    keep.add_argument("--estimate", action="store_true", help="print the disk space and time it takes; write nothing")
    return parser


def make_image_parser() -> argparse.ArgumentParser:
    """Make the parser of ``ackd predict`` with ``--images``; without it, Lightning predicts a run's test set."""
    parser = _Parser(prog="ackd predict", description="Predict any images with a run or an exported file.")
    parser.add_argument("run", help="run folder, checkpoint or exported file (.safetensors, .onnx, .pt2, .pte, .xml)")
    parser.add_argument(
        "--images", nargs="+", required=True, help="folders, image files, and tables (CSV, Parquet) with their paths"
    )
    parser.add_argument("--output", default="predictions.csv", help="file for the predictions: .csv or .parquet")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument("--top", type=int, default=1, help="number of classes for each image")
    parser.add_argument("--strict", action="store_true", help="exit with code 1 if files were skipped as unreadable")
    parser.add_argument("--which", choices=["last", "best"], default="last", help="checkpoint of a run folder")
    parser.add_argument("--batch-size", type=int, default=64, help="number of images of a batch")
    parser.add_argument("--workers", type=int, help="processes that decode images; default: up to 8, by their number")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="device that predicts")
    return parser


def _predicts_images(command: str, arguments: Sequence[str]) -> bool:
    """Whether ``ackd predict`` has an option for images, or an exported file, which has no data of its own."""
    files = (".safetensors", ".onnx", ".pt2", ".pte", ".xml")
    options = {"--images", "--top", "--strict", "--batch-size", "--workers", "--device"}
    exported = any(each.endswith(files) for each in with_values(arguments) if not each.startswith("-"))
    return command == "predict" and (exported or bool(options & {each.split("=")[0] for each in arguments}))


def _names(text: str) -> list[str]:
    if names := [part.strip() for part in text.split(",") if part.strip()]:
        return names
    raise argparse.ArgumentTypeError(f"{text!r} names nothing; name at least one, or leave the option out")


def _run(arguments: Sequence[str]) -> None:
    command = arguments[0] if arguments else "--help"
    if _predicts_images(command, arguments[1:]):
        options = vars(make_image_parser().parse_args(arguments[1:]))
        return _call("predict:predict", options.pop("run"), **options)
    if list(arguments[:2]) == ["completion", "--words"]:  # from the script of a shell
        find = pkgutil.resolve_name("ackd_lightning.commands.completion:candidates")
        return print("\n".join(find(make_parser(), arguments[2:])))
    if command in LIGHTNING:
        if wanted := asks_for_help(arguments[1:]):
            return _help(command, wanted)
        from ackd_lightning.launch.execute import run

        return run(command, arguments[1:])
    known = [*LIGHTNING, *_COMMANDS]
    if not command.startswith("-") and command not in known:
        raise ACKDError(f"{command!r} is not a command; {near_matches(command, known)}")
    given = with_values(arguments) if command in _PASS_ON else arguments
    chosen, others = make_parser().parse_known_args(given or ["--help"])
    options = vars(chosen)
    if name := _PASS_ON.get(options.pop("command")):
        options[name] = others
    elif others:
        raise ACKDError(f"unrecognized arguments: {' '.join(others)}; see `ackd {command} --help`")
    positional = [
        options.pop(name)
        for name in ("filter", "folder", "shell", "network", "run", "repository", "runs", "table")
        if name in options
    ]
    return _call(_COMMANDS[command], *positional, **options)


def _call(name: str, *positional: Any, **options: Any) -> None:
    function = pkgutil.resolve_name(f"ackd_lightning.commands.{name}")
    ended_by_signals()(function)(*positional, **options)  # imports could swallow what a handler raises: they are done


def _help(command: str, wanted: str) -> None:
    """Print the short help of a command of Lightning, or the complete one of its parser, for which torch is needed."""
    if wanted == "short":
        print(short_help(command), end="")
    else:
        from ackd_lightning.launch.options import make_parser as complete

        complete(command).print_help()
    if command == "predict":
        print(f"\nWith --images, for any images:\n\n{make_image_parser().format_help()}", end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``ackd``.

    Args:
        arguments: Command line without the program's name; None: that of the process.

    Returns:
        0; 2 for a mistake in the input; 1 for a failure while running; 128 plus its number after a signal.
    """
    for name in ("stdout", "stderr"):  # None or closed without a console: a service, pythonw, `>&-`
        if (stream := getattr(sys, name)) is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123  # until the end
    try:
        find_own_classes()
        _run([expand_home(each) for each in (sys.argv[1:] if arguments is None else arguments)])
        sys.stdout.flush()
    except RunFinishedError as error:
        print(f"ackd: {error}")
    except Exception as error:
        if os.environ.get("ACKD_DEBUG"):
            raise
        if isinstance(error, ACKDError | NotReadyError | NotWrittenError | RunsFailedError | UnreadableImagesError):
            return _failed(str(error), 2 if isinstance(error, ACKDError) else 1)
        first = (str(error).splitlines() or [""])[0]
        if isinstance(error, OSError) and error.errno in _FULL:
            return _failed(f"a file could not be written ({first}); free disk space and {command_after(arguments)}", 1)
        if isinstance(error, OSError) and error.errno in NOT_PERMITTED:
            return _failed(not_permitted(error), 1)
        if _LOST.search(str(error)):
            return _failed(
                "another process of this run has ended, by a signal or with the error that it prints; `ackd fit` with "
                f"--resume goes on from the last checkpoint ({type(error).__name__}: {first})",
                1,
            )
        if "parameters that were not used in producing the loss" in str(error):  # Lightning's words
            return _failed(
                "the loss of a step did not depend on all trainable parameters, as with a term that starts later, and "
                "DDP waits for the gradient of each: use --trainer.strategy ddp_find_unused_parameters_true",
                1,
            )
        return _failed(f"{type(error).__name__}: {first} (ACKD_DEBUG=1 shows where)", 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except RunStoppedError as end:
        return _failed(end.sentence, int(end.code or 0))
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit(1)
            return _failed("interrupted; --resume auto resumes a run that has a checkpoint", 130)
        if end.code == 143 or type(end).__name__ == "SIGTERMException":  # Lightning's would exit with 0
            return _failed("terminated", 143)
        raise
    return 0


def _failed(sentence: str, code: int) -> int:
    if code < 128 or os.environ.get("LOCAL_RANK", "0") == "0":  # of processes that a signal stops the first says so
        print(f"ackd: {sentence}", file=sys.stderr)
    return code


def script() -> None:
    """Exit the process with what ``main`` returns; output whose reader leaves does not end it before."""
    outlive_readers()
    print_log()
    sys.exit(main())
