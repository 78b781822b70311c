"""The Trainer of a run: loggers, callbacks, and settings that Lightning refuses."""

from __future__ import annotations

import inspect
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Checkpoint,
    LearningRateFinder,
    LearningRateMonitor,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO

from ackd_lightning.callbacks.answers import TestAnswers
from ackd_lightning.callbacks.checkpoints import WholeCheckpoints, checkpoints
from ackd_lightning.callbacks.disk import DiskSpaceCheck
from ackd_lightning.callbacks.figures import RunFigures
from ackd_lightning.callbacks.metrics_csv import CurvesFile
from ackd_lightning.callbacks.predictions import PredictionFile
from ackd_lightning.callbacks.progress import EpochLine, RunBar, is_terminal
from ackd_lightning.callbacks.settings import RunConfig
from ackd_lightning.callbacks.stopping import StopSafely, WholeStepTimer
from ackd_lightning.callbacks.summary import RunSummary
from ackd_lightning.callbacks.wandb import SafeWandbLogger, offline, run_id
from ackd_lightning.errors import ACKDError
from ackd_lightning.extras import require
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.messages import refused_by_trainer


def make_trainer(cli: ACKDCLI, folder: Path, *, copy_to: Path | None = None) -> L.Trainer:
    """Make a Trainer with the loggers and callbacks of a run, unless the settings name their own logger.

    Args:
        cli: Settings, with data module and training module built.
        folder: Folder of the run.
        copy_to: Second file that gets the student's weights; None for no copy.

    Raises:
        ACKDError: When Lightning refuses the settings.
    """
    settings: dict[str, Any] = dict(cli.built.trainer.items(branches=True, nested=False))
    fit, dry = cli.command == "fit", bool(settings["fast_dev_run"])
    callbacks = _as_list(settings["callbacks"])
    own_logger = settings["logger"] is not None
    if own_logger and (cli.option("wandb") or cli.option("tensorboard")):
        raise ACKDError("trainer.logger replaces the run's own loggers; leave it out beside --wandb or --tensorboard")
    if cli.model.automatic_optimization is False and settings["gradient_clip_val"]:
        raise ACKDError(
            "trainer.gradient_clip_val does not work with auxiliary optimizers (manual optimization); "
            "use --model.recipe.gradient_clip_val"
        )
    if cli.model.automatic_optimization is False and settings["accumulate_grad_batches"] not in (None, 1):
        raise ACKDError(
            f"trainer.accumulate_grad_batches is {settings['accumulate_grad_batches']} and does not work with "
            "auxiliary optimizers (manual optimization); leave it out, and use --data.batch_size for larger batches"
        )
    if fit and not dry and settings["enable_checkpointing"] is False:
        raise ACKDError(
            "trainer.enable_checkpointing is false, and the student is exported from the last checkpoint; leave it "
            "out, or use --trainer.fast_dev_run, which writes nothing"
        )
    if cli.model.automatic_optimization is False and any(isinstance(each, LearningRateFinder) for each in callbacks):
        raise ACKDError(
            f"LearningRateFinder finds the rate of one optimizer, and method {type(cli.model.method).__name__} has "
            "further ones; leave it out of trainer.callbacks"
        )
    averages = any(isinstance(each, StochasticWeightAveraging) for each in callbacks)
    if cli.model.automatic_optimization is False and averages:
        raise ACKDError(
            "StochasticWeightAveraging changes the rate of one optimizer, and method "
            f"{type(cli.model.method).__name__} has further ones; use --model.recipe.ema_decay"
        )
    if any(isinstance(each, BackboneFinetuning) for each in callbacks):
        raise ACKDError(
            "BackboneFinetuning freezes an attribute `backbone`, which this package's modules do not have; use "
            "--model.student.freeze or --model.student.backbone_lr_scale"
        )
    if not fit:
        settings["logger"] = settings["enable_checkpointing"] = False
        # of the fit, as config.yaml has them
        callbacks = [each for each in callbacks if not isinstance(each, (Checkpoint, LearningRateMonitor))]
    elif not own_logger:
        settings["logger"] = [] if dry else _loggers(cli, folder)
    if fit:
        summary = RunSummary(folder, config=cli.config_name, copy_to=copy_to)
        callbacks = [TestAnswers(folder), summary, *callbacks]  # in this order: the summary marks a finished run
        callbacks += [] if dry else _callbacks(cli, folder, summary)
        callbacks += [LearningRateMonitor(logging_interval="epoch")] if settings["logger"] else []
        plugins = _as_list(settings["plugins"])
        if not dry and not any(isinstance(each, CheckpointIO) for each in plugins):
            settings["plugins"] = [*plugins, WholeCheckpoints()]
    if cli.command == "test":
        callbacks.append(TestAnswers())
    if cli.command == "predict":
        callbacks.append(PredictionFile(Path(cli.option("output"))))
    if not any(isinstance(each, ProgressBar) for each in callbacks):
        if (bar := settings["enable_progress_bar"]) is None:
            bar = settings["enable_progress_bar"] = is_terminal(sys.stdout)
        if fit:
            callbacks += [EpochLine(summary), *([RunBar(summary)] if bar else [])]
    try:
        if fit and settings["max_time"] is not None and not any(isinstance(each, Timer) for each in callbacks):
            callbacks.append(WholeStepTimer(settings["max_time"]))
            settings["max_time"] = None
        return L.Trainer(**{**settings, "callbacks": callbacks})
    except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ACKDError(refused_by_trainer(error, inspect.signature(L.Trainer).parameters)) from error


def _callbacks(cli: ACKDCLI, folder: Path, summary: RunSummary) -> list[L.Callback]:
    validates = not getattr(cli.datamodule, "val_is_test", False) and cli.option("trainer.limit_val_batches") != 0
    return [
        *checkpoints(folder / "checkpoints", select=validates),
        StopSafely(
            folder / "checkpoints" / "last.ckpt", advice=f"`ackd fit --resume {shlex.quote(str(folder))}` goes on"
        ),
        DiskSpaceCheck(folder, copies=2 if summary.copy_to else 1),
        RunConfig(cli.parser, cli.config, folder=folder),
        RunFigures(folder),
    ]


def _loggers(cli: ACKDCLI, folder: Path) -> list[Logger]:
    """``metrics.csv`` always, W&B and TensorBoard when asked for."""
    folder = folder.resolve()  # a relative one may lack the name of the configuration
    root, config, name = folder.parents[1], folder.parent.name, folder.name
    loggers: list[Logger] = [CurvesFile(root, name=config, version=name)]
    project = cli.option("wandb")
    if project is not None:
        folder.mkdir(parents=True, exist_ok=True)
        loggers.append(
            SafeWandbLogger(
                project=project,
                name=f"{config}/{name}",
                save_dir=folder,
                offline=offline(),
                id=run_id(folder),
                resume="allow",
            )
        )
    if cli.option("tensorboard"):
        if find_spec("tensorboardX") is None:
            require("tensorboard", "tensorboard", "--tensorboard")
        loggers.append(TensorBoardLogger(root, name=config, version=name))
    return loggers


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
