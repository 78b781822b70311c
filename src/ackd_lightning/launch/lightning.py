"""``ackd fit | validate | test | predict``: LightningCLI with this package's configurations, folders and messages."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from ackd_lightning.callbacks.checkpoints import WholeCheckpoints, checkpoints
from ackd_lightning.callbacks.disk import DiskSpaceCheck
from ackd_lightning.callbacks.metrics_csv import CurvesFile
from ackd_lightning.callbacks.predictions import PredictionFile
from ackd_lightning.callbacks.progress import EpochLine
from ackd_lightning.callbacks.settings import RunConfig
from ackd_lightning.callbacks.stopping import StopSafely
from ackd_lightning.callbacks.summary import RunSummary
from ackd_lightning.callbacks.wandb import SafeWandbLogger, offline
from ackd_lightning.config.class_paths import check_classes
from ackd_lightning.config.files import find_config, load_configs
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import (
    Given,
    check_shape,
    deepest,
    name_checkpoint,
    refuse_linked,
    refused_by_trainer,
    shorten,
    split_configs,
)
from ackd_lightning.launch.options import add_options, spell_out
from ackd_lightning.launch.preflight import (
    check_checkpoint,
    check_name,
    check_numbers,
    check_processes,
    check_world,
    check_writable,
)
from ackd_lightning.runs.claim import Claim, claim
from ackd_lightning.runs.files import read_summary, run_folder, write_json
from ackd_lightning.runs.resume import changed_settings, resume_auto, resume_from
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.training.speed import keep_freed_memory

_RUN_NAME = "ACKD_RUN_NAME"
_RESUMED = "ACKD_RESUMED"
_SECTIONS = ("model", "data", "trainer", "seed_everything", "name", "runs_dir", "publish", "ckpt_path", "resume")
_ROOTS = {"model": DistillationModule, "data": ImageDataModule}


class Parser(LightningArgumentParser):
    """Errors in one sentence."""

    known: ClassVar[set[str]] = set()
    given: ClassVar[Given] = Given({}, (), {})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing pages of usage."""
        own = {action.dest for action in self._actions if action.dest not in ("help", "==SUPPRESS==")}
        valid = self.known if "NestedArg" in message else own | self.known
        if "Subcommand" in message:
            valid = {*_SECTIONS, *(f"trainer.{name}" for name in inspect.signature(L.Trainer).parameters)}
        ours = deepest(ex)
        raise ACKDError(str(ours) if ours else shorten(message, valid, self.given)) from ex


class ACKDCLI(LightningCLI):
    """One run in one folder: builds everything from settings, and hands it to Lightning.

    Args:
        command: fit, validate, test or predict.
        arguments: the rest of the command line, ``--config`` included.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        configs, rest = split_configs(arguments)
        # a test of other data, of another model or of a part is not the run's test
        self.altered = any(argument.startswith(("--data", "--model", "--trainer.limit")) for argument in rest)
        if command != "fit":
            configs, rest = name_checkpoint(configs, rest)
        settings, self.config_name = load_configs(configs)
        refuse_linked(settings, rest)
        Parser.given = Given({each: find_config(each).resolve() for each in configs}, rest, settings)
        check_shape(settings, Parser.given)
        Parser.known = check_classes(settings, _ROOTS, L.Trainer)
        self.folder = Path()
        self.claim: Claim | None = None
        self.content: dict[str, Any] | None = None  # of the checkpoint that is resumed, until it was checked
        with self._folder_kept_if_used(), tempfile.TemporaryDirectory(prefix="ackd-") as folder:
            merged = Path(folder) / "settings.yaml"
            merged.write_text(json.dumps(settings), encoding="utf-8")
            super().__init__(
                DistillationModule,
                ImageDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_callback=RunConfig,
                parser_class=Parser,
                trainer_defaults={"enable_model_summary": False},
                args=[command, *(["--config", str(merged)] if configs else []), *rest],
            )

    @contextlib.contextmanager
    def _folder_kept_if_used(self) -> Iterator[None]:
        """Release the run's folder at the end, and remove it after a mistake in the input before the first step."""
        try:
            yield
        except Exception as error:
            started = getattr(self, "trainer", None) is not None and self.trainer.global_step > 0
            if self.claim is not None and not started and deepest(error) is not None:
                self.claim.discard()
            raise
        finally:
            if self.claim is not None:
                self.claim.release()

    # ---------------------------------------------------------------- parsing

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """No abbreviations: a mistyped option must not become another one."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of ours, and what the data tells the model."""
        add_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ours, whatever stands in sys.argv; nothing that is named there has been called yet."""
        self.config = parser.parse_args(args)
        settings = self.config[self.command]
        check_classes(vars(settings), _ROOTS, L.Trainer)
        check_numbers(settings.as_dict())
        spell_out(settings)

    def _parse_ckpt_path(self) -> None:
        """Explicit settings win over those in a checkpoint (Lightning lets the checkpoint win)."""

    # ---------------------------------------------------------------- building

    def option(self, name: str) -> Any:
        """Value of an option of the subcommand.

        Args:
            name: such as ``trainer.max_epochs``.
        """
        return self._get(self.config, name)

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and refuse one that is taken."""
        if self.option("name") is not None:
            check_name(self.option("name"))
        name = self.option("name") or time.strftime("%Y%m%d-%H%M%S")
        launched_by_us = "LOCAL_RANK" in os.environ and _RUN_NAME in os.environ
        name = os.environ[_RUN_NAME] if launched_by_us else name
        os.environ[_RUN_NAME] = name  # read by the processes that Lightning starts for DDP
        self.folder = Path(self.option("runs_dir")) / (self.config_name or "run") / name
        if self.command == "fit" and self.option("resume"):
            self._resume(launched_by_us)
        if self.command != "fit" and not self.option("ckpt_path"):
            raise ACKDError(
                f"`ackd {self.command}` has no run; write `ackd {self.command} RUN`, or name --ckpt_path FILE"
            )
        if self.command == "predict" and Path(self.option("output")).exists():
            raise ACKDError(f"--output {self.option('output')} exists; choose another file")
        if self.command == "predict":
            check_writable(Path(self.option("output")).parent, "the folder of --output,")
        if self.command != "fit" or self.option("trainer.fast_dev_run") or launched_by_us or _rank() != 0:
            return
        resumed = self.option("ckpt_path")
        if resumed and not Path(resumed).is_file():
            raise ACKDError(f"--ckpt_path {resumed} does not exist; name a checkpoint that `ackd fit` wrote")
        own = bool(resumed) and self.folder.resolve() in Path(resumed).resolve().parents
        name = self.folder.name if own or self.option("name") else None
        self.claim = claim(self.folder.parent, name, resume=own)
        self.folder = self.claim.folder
        os.environ[_RUN_NAME] = self.folder.name
        target = self.publish_path()
        if target is not None and target.exists() and not own:
            raise ACKDError(
                f"weights {target} exist and this run would replace them; move them, or pass --publish OTHER_FOLDER"
            )
        if target is not None:
            check_writable(target.parent, "--publish")

    def _resume(self, launched_by_us: bool) -> None:
        """Find the run that goes on, and let its checkpoint be the one to start from."""
        value = self.option("resume")
        if self.option("ckpt_path"):
            raise ACKDError("--resume and --ckpt_path both name a checkpoint; leave --ckpt_path out")
        if launched_by_us:
            found = resume_from(os.environ[_RESUMED]) if _RESUMED in os.environ else None
        elif value == "auto":
            found = resume_auto(self.folder.parent, self.option("name"), self.option("seed_everything"))
        else:
            found = resume_from(value)
        os.environ.pop(_RESUMED, None)
        if found is None:
            return
        os.environ[_RESUMED] = str(found.checkpoint)  # as the name, for the processes that Lightning starts
        os.environ[_RUN_NAME] = found.folder.name
        self.folder, self.content = found.folder, found.content
        self.config[self.subcommand].ckpt_path = str(found.checkpoint)
        if _rank() == 0 and not launched_by_us:
            print(f"going on with {found.checkpoint}" + (f"; {found.note}" if found.note else ""), flush=True)
            changes = changed_settings(self.folder, self.settings())
            if changes:
                print(
                    f"settings that differ from the run's start: {', '.join(changes)} "
                    "(learning rates in the checkpoint's optimizer stay)",
                    flush=True,
                )

    def settings(self) -> dict[str, Any]:
        """What the run writes as its ``config.yaml``."""
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        settings: dict[str, Any] = yaml.safe_load(text)
        return settings

    def publish_path(self) -> Path | None:
        """Second place of the student's weights; None for most runs."""
        folder = self.option("publish")
        return Path(folder) / f"{self.config_name}.safetensors" if folder else None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add loggers and callbacks of a run, unless the settings name their own logger."""
        fit, dry = self.command == "fit", bool(self.option("trainer.fast_dev_run"))
        chosen = self._get(self.config_init, "trainer.callbacks") or []
        callbacks: list[L.Callback] = list(chosen) if isinstance(chosen, list) else [chosen]
        self.save_config_kwargs = {"folder": self.folder}
        if self.option("trainer.logger") is not None and (self.option("wandb") or self.option("tensorboard")):
            raise ACKDError(
                "trainer.logger replaces the run's own loggers; leave it out beside --wandb or --tensorboard"
            )
        if fit and self.option("trainer.logger") is None:
            kwargs["logger"] = [] if dry else self.loggers()
        elif not fit:
            kwargs["logger"] = kwargs["enable_checkpointing"] = False
        if fit:
            select = not (isinstance(self.datamodule, ImageDataModule) and self.datamodule.val_is_test)
            callbacks += [] if dry else checkpoints(self.folder / "checkpoints", select=select)
            self.summary = RunSummary(self.folder, config=self.config_name, copy_to=self.publish_path())
            callbacks.append(self.summary)
            if not dry:
                last = self.folder / "checkpoints" / "last.ckpt"
                advice = f"the same command with --resume {self.folder} goes on"
                callbacks.append(StopSafely(last, advice=advice))
                callbacks.append(DiskSpaceCheck(self.folder, copies=2 if self.publish_path() else 1))
                kwargs["plugins"] = self._plugins()
            if kwargs.get("logger"):
                callbacks.append(LearningRateMonitor(logging_interval="epoch"))
        if self.command == "predict":
            callbacks.append(PredictionFile(Path(self.option("output"))))
        if not sys.stdout.isatty() and self.option("trainer.enable_progress_bar") is None:
            kwargs["enable_progress_bar"] = False
            callbacks += [EpochLine()] if fit else []
        if self.model.automatic_optimization is False and self.option("trainer.gradient_clip_val"):
            raise ACKDError(
                "trainer.gradient_clip_val does not work with discriminators (manual optimisation); "
                "use --model.gradient_clip_val"
            )
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise ACKDError(refused_by_trainer(error, inspect.signature(L.Trainer).parameters)) from error
        self.keeps_memory = fit and isinstance(trainer.accelerator, CPUAccelerator) and keep_freed_memory()
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Look at what can be known to fail, then carry it out."""
        cpu = isinstance(self.trainer.accelerator, CPUAccelerator)
        check_processes("cpu" if cpu else "other", self.trainer.num_devices)
        if subcommand == "fit" and isinstance(self.datamodule, ImageDataModule):
            check_world(self.datamodule.batch_size, self.trainer.num_devices * self.trainer.num_nodes)
        checkpoint = self.option("ckpt_path")
        if checkpoint:
            check_checkpoint(Path(checkpoint), self.model, self.content)
            self.content = None
            summary = run_folder(Path(checkpoint)) / "summary.json"
            if subcommand == "test" and summary.is_file():
                read_summary(summary.parent)
        super()._run_subcommand(subcommand)

    def _plugins(self) -> list[Any]:
        """The plugins of the settings, and ours that writes checkpoints, unless they bring one."""
        given = self._get(self.config_init, "trainer.plugins") or []
        plugins = list(given) if isinstance(given, (list, tuple)) else [given]
        brings_one = any(isinstance(each, CheckpointIO) for each in plugins)
        return plugins if brings_one else [*plugins, WholeCheckpoints()]

    def loggers(self) -> list[Logger]:
        """``metrics.csv`` always, W&B and TensorBoard when asked for."""
        root, config, name = self.folder.parents[1], self.folder.parent.name, self.folder.name
        loggers: list[Logger] = [CurvesFile(root, name=config, version=name)]
        project = self.option("wandb")
        if project is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            loggers.append(
                SafeWandbLogger(project=project, name=f"{config}/{name}", save_dir=self.folder, offline=offline())
            )
        if self.option("tensorboard"):
            loggers.append(TensorBoardLogger(root, name=config, version=name))
        return loggers

    # ---------------------------------------------------------------- running

    def before_fit(self) -> None:
        """A missing teacher ends the run before anything is written."""
        self.model.load_teacher()

    def after_fit(self) -> None:
        """Print the summary, when the progress bar is gone, and test when asked to."""
        self.summary.show()
        if not self.option("test") or self.option("trainer.fast_dev_run"):
            return
        if isinstance(self.datamodule, ImageDataModule) and self.datamodule.val_is_test and self.summary.up_to_date:
            return  # the last epoch was measured on the test set
        for name in ("last", "best"):
            checkpoint = self.folder / "checkpoints" / f"{name}.ckpt"
            if checkpoint.is_file():
                self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=str(checkpoint), verbose=False)
                self._keep_test(checkpoint)
                print(f"test, {name}: accuracy {float(self.trainer.callback_metrics['test/acc']):.2%}")

    def after_test(self) -> None:
        """Keep the test accuracies with the run."""
        checkpoint = self.option("ckpt_path")
        if not checkpoint:
            return
        run = run_folder(Path(checkpoint))
        if self.altered:
            print(f"not kept in {run}: the test was changed on the command line")
            return
        self._keep_test(Path(checkpoint))

    def _keep_test(self, checkpoint: Path) -> None:
        """Write the accuracies of a test into the summary of its run."""
        if not self.trainer.is_global_zero:
            return
        run = run_folder(checkpoint)
        if (run / "summary.json").is_file():
            which = checkpoint.stem
            measured = self.trainer.callback_metrics.items()
            values = {key: float(value) for key, value in measured if not key.startswith(("train/", "val/"))}
            summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            summary.setdefault("test", {})[which] = values
            write_json(summary, run / "summary.json")


def _rank() -> int:
    """Rank of this process, also when torchrun or SLURM started it."""
    return int(getattr(rank_zero_only, "rank", None) or 0)
