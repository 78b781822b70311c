"""Options of ``ackd fit | validate | test | predict``, and the values that they and the settings stand for."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Collection
from dataclasses import asdict
from typing import Any, Literal, NoReturn, get_args

import lightning.pytorch as L
import torch
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]  # not in its __all__
from lightning.pytorch.cli import LightningArgumentParser

from ackd_lightning.data.base import info_of
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch import LIGHTNING
from ackd_lightning.launch.arguments import set_length
from ackd_lightning.launch.messages import RefusedError
from ackd_lightning.launch.short_help import FIT_TEXTS, TEXTS
from ackd_lightning.models.branches import default_branches
from ackd_lightning.models.finding import plan_for, use_taps
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.training.schedule import Recipe
from ackd_lightning.training.speed import fast_settings

_TEXT = {"type": str | None, "default": None}
_PROJECT = "ackd-lightning"
_KINDS: dict[str, dict[str, Any]] = {
    # with and without a value, as sweeps write --fast=True
    **{
        name: {"type": bool, "default": False, "nargs": "?", "const": True}
        for name in ("tensorboard", "test", "fast", "overwrite")
    },
    "runs_dir": {"type": str, "default": "runs"},
    "resume": {**_TEXT, "metavar": "auto|PATH"},
    "wandb": {**_TEXT, "type": str | bool | None, "metavar": "PROJECT", "nargs": "?", "const": _PROJECT},
    "on_nonfinite": {"type": Literal["stop", "skip"] | None, "default": None},
}
_SWITCH = dict.fromkeys(("false", "no", "off"), None) | dict.fromkeys(("true", "yes", "on"), _PROJECT)
"""What ``--wandb`` may be instead of a project: nothing is logged, or the project of its default."""
FIT_ONLY = tuple(FIT_TEXTS)
"""Options that only ``ackd fit`` has."""


class Parser(LightningArgumentParser):
    """Parser that raises its errors; the one in the chain that is closest to the mistake is put into words."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing pages of usage."""
        raise RefusedError(message, self.names()) from ex

    def names(self) -> set[str]:
        """Return the dotted names of the settings that the parser knows."""
        names = {action.dest for action in self._actions}
        return {each for each in names if not each.endswith(("help", "==SUPPRESS=="))} - {"model.data"}

    def whole_numbers_first(self) -> None:
        """Read 1 as a whole number wherever whole numbers and shares are allowed: 1 batch is not 1.0, all of them.

        ``typing`` caches unions without their order, so that Lightning's own order depends on what was imported before.
        """
        for action in self._actions:
            kinds = get_args(getattr(action, "_typehint", None))
            if int in kinds and float in kinds[: kinds.index(int)]:
                ordered = sorted(kinds, key=lambda kind: kind is not int)
                vars(action)["_typehint"] = functools.reduce(operator.or_, ordered)


def data_parser() -> Parser:
    """Make a parser of the data module alone."""
    parser = Parser(allow_abbrev=False)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    return parser


@functools.cache
def make_parser(command: str) -> Parser:
    """Make the parser of a subcommand, once for all command lines that a process reads.

    Args:
        command: fit, validate, test or predict.
    """
    # no abbreviations: a mistyped option must not become another one
    parser = Parser(prog=f"ackd {command}", description=LIGHTNING[command], allow_abbrev=False)
    parser.add_argument(
        "-c",
        "--config",
        action=ActionConfigFile,
        help=TEXTS["config"],
    )
    parser.add_argument("--seed_everything", type=int, default=0, help=TEXTS["seed_everything"])
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_class_arguments(
        DistillationModule, "model", skip={"student", "teacher"}, fail_untyped=False, sub_configs=True
    )
    # the annotations in Python take names and networks as well, and then jsonargparse finds no options below them
    parser.add_argument(
        "--model.student",
        type=StudentConfig,
        help="student, such as --model.student resnet8, short for --model.student.network resnet8",
    )
    parser.add_argument(
        "--model.teacher",
        type=TeacherConfig | list[TeacherConfig] | None,
        default=None,
        help="teacher, such as --model.teacher.network resnet110 --model.teacher.weights FILE; or a list of teachers",
    )
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    parser.link_arguments("data", "model.data", compute_fn=info_of, apply_on="instantiate")
    # the recipe comes from configs/recipes/sgd.yaml: another class would inherit the arguments of a default here
    parser.set_defaults({"trainer.enable_model_summary": False, "model.optimizer": None, "model.lr_scheduler": None})
    parser.set_defaults({"model.recipe": asdict(Recipe())})
    parser.add_argument("--ckpt_path", type=str | None, default=None, help=TEXTS["ckpt_path"])
    if command == "fit":
        for name, text in FIT_TEXTS.items():
            parser.add_argument(f"--{name}", help=text, **_KINDS.get(name, _TEXT))
    if command == "predict":
        parser.add_argument("--output", type=str, default="predictions.csv", help=TEXTS["output"])
        parser.add_argument("--overwrite", help=TEXTS["overwrite"], **_KINDS["overwrite"])
    parser.whole_numbers_first()
    return parser


def interval_of(model: Any) -> str:
    """Return what the learning rate of a fit follows, ``epoch`` or ``step``.

    Args:
        model: Parsed settings below ``model``.
    """
    return "epoch" if model.recipe is None else str(model.recipe.interval)


def spell_out(settings: Any, stated: Collection[str]) -> None:
    """Move short options to the settings that they stand for, and replace automatic values by what they become.

    Args:
        settings: Parsed settings; changed in place.
        stated: Names of the settings on the command line, which no short option changes.

    Raises:
        ACKDError: For a scheduler whose length is not known.
    """
    model, trainer = settings.model, settings.trainer
    if settings.get("on_nonfinite") is not None:
        model.on_nonfinite, settings.on_nonfinite = settings.on_nonfinite, None
    if (project := str(settings.get("wandb")).lower()) in _SWITCH:
        settings.wandb = _SWITCH[project]
    if settings.get("fast"):
        settings.fast = False
        for name, value in fast_settings(str(trainer.accelerator)).items():
            if settings[name] in (None, False) and name not in stated:  # a value that is given stays
                settings[name] = value
    set_length(model.lr_scheduler, epochs=trainer.max_epochs, steps=trainer.max_steps, interval=interval_of(model))
    arguments = model.method.get("init_args") if model.method is not None else None
    if arguments is not None and arguments.get("branches", ()) is None and isinstance(model.student.network, str):
        with contextlib.suppress(ACKDError), torch.device("meta"):  # a wrong name is reported by the constructor
            network = create_model(model.student.network, 10, **(model.student.options or {}))
            plan = use_taps(network, model.student.taps) if model.student.taps else plan_for(network)
            arguments.branches = list(default_branches(plan)) if plan is not None else None
