"""Options of ``ackd fit`` beside those of Lightning: their help texts, and what the short ones stand for."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser

from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import FROM_DATA
from ackd_lightning.training.speed import fast_settings


def add_options(parser: ArgumentParser) -> None:
    """Add the options, and link what the data tells the model.

    Args:
        parser: of one subcommand.
    """
    for name in FROM_DATA:
        parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
    parser.add_argument("--name", type=str | None, default=None, help="name of the run; a time stamp when left out")
    parser.add_argument("--runs_dir", type=str, default="runs", help="runs are written to RUNS_DIR/CONFIG/NAME")
    parser.add_argument(
        "--resume",
        type=str | None,
        default=None,
        metavar="auto|PATH",
        help="go on with the newest unfinished run of this configuration (of this --name, if given), or with PATH",
    )
    parser.add_argument(
        "--publish",
        type=str | None,
        default=None,
        help="folder that also gets the weights, as CONFIG.safetensors (teacher configurations set it)",
    )
    parser.add_argument(
        "--wandb",
        type=str | None,
        nargs="?",
        const="ackd-lightning",
        default=None,
        metavar="PROJECT",
        help="log to Weights & Biases; offline when no key is known",
    )
    parser.add_argument("--output", type=str, default="predictions.csv", help="file of `ackd predict`")
    parser.add_argument(
        "--test", action="store_true", help="test the last and the best checkpoint when the fit has ended"
    )
    parser.add_argument(
        "--on_nan",
        type=Literal["stop", "skip"] | None,
        default=None,
        help="what a loss that is not finite does: end the run, or skip the step and count it; "
        "short for --model.on_nan, stop when left out",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="the fast settings: bfloat16 where the hardware has it, channels last, compiled networks; short for "
        "--trainer.precision bf16-mixed --model.channels_last true --model.compile true",
    )
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, into the run's folder")


def spell_out(settings: Any) -> None:
    """Write what the short options say at the places that they stand for.

    Args:
        settings: parsed; changed in place.

    Raises:
        ACKDError: for an option that the chosen model does not know.
    """
    if settings.on_nan is not None:  # a short name, kept at the place it stands for
        if "on_nan" not in settings.model.get("init_args", {}):
            raise ACKDError(f"--on_nan is unknown to {settings.model.class_path}; leave it out")
        settings.model.init_args.on_nan, settings.on_nan = settings.on_nan, None
    if settings.fast:
        settings.fast = False
        for name, value in fast_settings(str(settings.trainer.accelerator)).items():
            section, _, key = name.rpartition(".")
            place = settings.trainer if section == "trainer" else settings.model.init_args
            if key not in place:
                raise ACKDError(f"--fast is unknown to {settings.model.class_path}; leave it out")
            if place[key] in (None, False):  # what is given stays
                place[key] = value
