"""Short help of the commands of Lightning: the settings that people use, and where the others are; without torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ackd_lightning.launch import LIGHTNING

_HELP = ("-h", "--help")
TEXTS = {
    "config": "configuration: a file, or the name of a packaged one (`ackd configs`); later ones are laid over "
    "earlier; methods joined by + are added, as in kd+crd",
    "seed_everything": "seed of weights, data order and augmentation",
    "ckpt_path": "checkpoint to start from or to evaluate",
    "output": "CSV file for the predictions",
    "overwrite": "replace the file of --output",
}
"""Help of the options that every command has, and of those of ``ackd predict``."""
FIT_TEXTS = {
    "name": "name of the run; default: a time stamp",
    "runs_dir": "the run is written to RUNS_DIR/CONFIG/NAME",
    "resume": "resume the newest unfinished run of this configuration and seed (or of this --name), or the run at PATH",
    "weights_dir": "folder that also gets the student's weights, as CONFIG.safetensors (teacher configurations set it)",
    "wandb": "log to Weights & Biases; offline when no key is known",
    "tensorboard": "log to TensorBoard, into the run's folder",
    "test": "test the last and the best checkpoint after the fit",
    "on_nonfinite": "how to handle a non-finite loss: end the run, or skip the step and count it; short for "
    "--model.on_nonfinite",
    "fast": "bfloat16 where the hardware has it, channels-last layout and compiled networks; short for "
    "--trainer.precision bf16-mixed --model.channels_last true --model.compile true",
}
"""Help of the options that only ``ackd fit`` has."""


@dataclass(frozen=True)
class Entry:
    """A line of the short help.

    Attributes:
        name: Dotted name of the setting.
        value: Kind of value; empty for a switch.
        text: Meaning.
        default: Value without any configuration, on data of one of this package's data modules.
        shown: Words for the default where the value says little; empty for the value itself.
    """

    name: str
    value: str
    text: str = ""
    default: Any = None
    shown: str = ""

    def help(self) -> str:
        """Return the text with the default."""
        text = self.text or {**TEXTS, **FIT_TEXTS}[self.name]
        default = self.shown or ("" if self.default is None or self.default is False else str(self.default))
        return f"{text} (default: {default})" if default else text


ENTRIES = (
    Entry("seed_everything", "N", default=0),
    Entry("name", "NAME"),
    Entry("runs_dir", "FOLDER", default="runs"),
    Entry("resume", "auto|PATH"),
    Entry("data.root", "FOLDER", "folder of the data", shown="data"),
    Entry("data.batch_size", "N", "global batch size, over all processes", 128),
    Entry("data.num_workers", "N", "processes that read images; results do not depend on it", 0),
    Entry("data.max_per_class", "N", "largest number of training images of each class", shown="all"),
    Entry("data.train_fraction", "SHARE", "share of the training images that is used", 1.0),
    Entry("data.sampling", "shuffle|balanced", "balanced: classes of unequal size equally often", "shuffle"),
    Entry("trainer.max_epochs", "N", "length of the training", shown="1000 epochs"),
    Entry("trainer.devices", "N", "number of GPUs or processes", "auto"),
    Entry("trainer.precision", "P", "bf16-mixed: mixed precision", shown="32-true"),
    Entry("trainer.fast_dev_run", "N", "run N batches and write no files, to check the settings", default=False),
    Entry("model.method.temperature", "T", "argument of the method, as any other of its arguments", shown="its own"),
    Entry("model.optimizer", "CLASS", "optimizer of torch or of your own", shown="SGD"),
    Entry("model.optimizer.lr", "RATE", "its learning rate, as any other of its arguments", 0.1),
    Entry("model.lr_scheduler", "CLASS", "learning rate schedule", shown="MultiStepLR"),
    Entry("model.lr_scheduler.milestones", "LIST", "epochs at which it lowers the rate", [100, 150]),
    Entry("model.recipe.warmup_epochs", "N", "epochs over which the learning rates grow to those of the schedule", 0),
    Entry("model.recipe.gradient_clip_val", "NORM", "largest norm of the gradient"),
    Entry("model.recipe.class_weights", "auto", "weights in the loss for classes of unequal size"),
    Entry("model.recipe.early_stopping", "N", "end after N validations without a better accuracy"),
    Entry("model.teacher.weights", "FILE", "weights of the teacher"),
    Entry("model.on_class_mismatch", "stop|ignore", "ignore: class names that differ do not end the run", "stop"),
    Entry("on_nonfinite", "stop|skip", shown="stop"),
    Entry("fast", "", default=False),
    Entry("test", "", default=False),
    Entry("wandb", "PROJECT"),
    Entry("tensorboard", "", default=False),
)
"""The settings of ``ackd fit`` that docs/train.md lists, and those that every run has to know."""
_EVALUATE = (
    Entry("which", "last|best", "checkpoint of the run", shown="last"),
    Entry("data.root", "FOLDER", "folder of the data", shown="that of the run"),
    Entry("data.num_workers", "N", "processes that read images", shown="as in the run"),
    Entry("data.eval_batch_size", "N", "images of a batch", shown="as in the run"),
    Entry("trainer.devices", "N", "number of GPUs or processes", shown="as in the run"),
    Entry("trainer.precision", "P", "bf16-mixed: mixed precision", shown="as in the run"),
    Entry("ckpt_path", "FILE"),
)


def asks_for_help(arguments: Sequence[str]) -> str | None:
    """Return which help a command line asks for: ``short`` or ``all``; None if it asks for none.

    Args:
        arguments: Command line after the subcommand.

    Examples:
        >>> [asks_for_help(line.split()) for line in ("--config kd -h", "--help all", "--name help")]
        ['short', 'all', None]
    """
    place = next((number for number, each in enumerate(arguments) if each in _HELP), None)
    if place is None:
        return None
    return "all" if list(arguments[place + 1 : place + 2]) == ["all"] else "short"


def entries_of(command: str) -> tuple[Entry, ...]:
    """Return the settings in the short help of a subcommand.

    Args:
        command: fit, validate, test or predict.
    """
    output = (Entry("output", "FILE", default="predictions.csv"), Entry("overwrite", ""))
    return ENTRIES if command == "fit" else (*_EVALUATE, *(output if command == "predict" else ()))


def options_of(command: str) -> dict[str, list[str] | None]:
    """Return the options in the short help of a subcommand, for completion.

    Args:
        command: fit, validate, test or predict.

    Returns:
        By option: its values, an empty list for free ones, None for a switch.
    """
    found: dict[str, list[str] | None] = {"--help": None, "--print_config": None}
    if command == "fit":
        found["--config"] = []
    for entry in entries_of(command):
        words = entry.value.split("|") if "|" in entry.value else []
        found[f"--{entry.name}"] = [each for each in words if each.islower()] if entry.value else None
    return found


def short_help(command: str) -> str:
    """Return the short help of a subcommand.

    Args:
        command: fit, validate, test or predict.
    """
    fit = command == "fit"
    usage = "ackd fit --config NAME [--config METHOD] [--SETTING VALUE ...]"
    parser = argparse.ArgumentParser(
        add_help=False,
        usage=usage if fit else f"ackd {command} RUN [--which best] [--SETTING VALUE ...]",
        description=LIGHTNING[command],
        epilog=f"Every other setting: `ackd {command} {'--config NAME' if fit else 'RUN'} --print_config` with its "
        f"value, `ackd {command} --help all` with its type and meaning"
        + (", `ackd fit --model.method.help KD` for the arguments of a class." if fit else "."),
    )
    settings = parser.add_argument_group("settings" if fit else "settings that replace those of the run")
    if fit:
        settings.add_argument("-c", "--config", metavar="NAME", help=TEXTS["config"])
    for entry in entries_of(command):
        kind: dict[str, Any] = {"metavar": entry.value} if entry.value else {"action": "store_true"}
        settings.add_argument(f"--{entry.name}", help=entry.help(), **kind)
    return parser.format_help()
