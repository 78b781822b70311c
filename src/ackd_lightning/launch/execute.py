"""Run one subcommand in one run folder, with the warnings and errors of Lightning in one sentence."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator

from ackd_lightning.callbacks.answers import TestAnswers
from ackd_lightning.callbacks.summary import RunSummary
from ackd_lightning.data.messages import on_first_process
from ackd_lightning.errors import NOT_PERMITTED, ACKDError, not_permitted
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.measured import show_measured
from ackd_lightning.launch.messages import first_cause
from ackd_lightning.launch.preflight import (
    check_checkpoint,
    check_loaders,
    check_name,
    check_predictions,
    check_processes,
    check_writable,
)
from ackd_lightning.launch.run_settings import changed_test, refuse_other_place, started_with
from ackd_lightning.launch.trainer import make_trainer
from ackd_lightning.launch.words import as_given, raised_in
from ackd_lightning.runs.claim import Claim, claim, say_unfinished
from ackd_lightning.runs.files import STUDENT, copied_from, read_summary, run_folder, same_content, write_json
from ackd_lightning.runs.resume import Length, changed_settings, check_length, resume_auto, resume_from, say_other_seeds
from ackd_lightning.training.speed import keep_freed_memory

_RUN_NAME = "ACKD_RUN_NAME"
_RESUMED = "ACKD_RESUMED"
_SCHEDULE = ("model.lr_scheduler", "model.recipe.warmup", "trainer.max_")
"""What the names of settings begin with that the learning rate follows."""
_CHATTY = (
    "lightning.pytorch.utilities.rank_zero",  # tips, device lists
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",  # how it reads an argument of its own
)
_NOT_OURS = (
    ".*LeafSpec.*",  # torch 2.15 deprecates what Lightning 2.6.6 calls
    ".*smaller than the logging interval.*",  # epoch means are logged whatever the interval
    ".*does not have many workers.*",  # data in memory needs none
    ".*callbacks used to create the checkpoint need to be provided.*",  # not for testing
    ".*exists and is not empty.*",  # the run's folder was checked before
    ".*using the WeightAveraging callback, but loading a checkpoint outside.*",  # the checkpoint has the average
    ".*module\\(s\\) in eval mode at the start.*",  # what a method has frozen
    ".*ModelCheckpoint\\(monitor='val/acc'\\)` could not find.*",  # the summary says that there was no validation
)


class Execution:
    """One subcommand in one folder: claim the folder, build, make the Trainer, check, execute.

    Args:
        cli: Settings.

    Attributes:
        claim: Claim of the folder; None where nothing is written to it.
        trainer: Trainer, after ``make_trainer``.
    """

    trainer: L.Trainer

    def __init__(self, cli: ACKDCLI) -> None:
        self.cli, self.option, self.fit = cli, cli.option, cli.command == "fit"
        self.claim: Claim | None = None
        self._content: dict[str, Any] | None = None  # of the checkpoint that is resumed, until it was checked
        self.dry = bool(cli.option("trainer.fast_dev_run"))
        weights_dir = cli.option("weights_dir")
        self.copy_to = Path(weights_dir) / f"{cli.config_name}.safetensors" if weights_dir else None

    def run(self) -> None:
        """Build everything, check what can be known to fail, and run.

        The run's folder is removed after a mistake in the input that shows before the first step.

        Raises:
            ACKDError: For whatever is wrong with the input.
        """
        L.seed_everything(self.option("seed_everything"), workers=True)
        if self.cli.followed and on_first_process() and "LOCAL_RANK" not in os.environ:
            print(self.cli.followed, flush=True)
        try:
            self.choose_folder()
            self.cli.build()
            self.make_trainer()
            self._check()
            self._say_fresh()
            self.execute()
        except Exception as error:
            started = hasattr(self, "trainer") and self.trainer.global_step > 0
            of_lightning = isinstance(error, MisconfigurationException | ModuleNotFoundError) or (
                isinstance(error, ValueError) and raised_in(error).startswith("lightning.")
            )
            refused = of_lightning and not isinstance(first_cause(error), ACKDError) and not started
            if self.claim is not None and not started and (refused or isinstance(first_cause(error), ACKDError)):
                self.claim.discard()
            if refused and "error where more than one `__init__`" in str(error):  # Lightning's, about `ackd predict`
                raise ACKDError(
                    f"{type(self.cli.datamodule).__name__} gives batch_size to its DataLoader by position, with which "
                    "Lightning cannot predict; write DataLoader(dataset, batch_size=...)"
                ) from error
            if refused:  # by a callback, or by what Lightning checks when a fit begins
                raise ACKDError(" ".join(str(error).split())[:400]) from error
            raise
        finally:
            if self.claim is not None:
                self.claim.release()

    def execute(self) -> None:
        """Run the Trainer, then show and keep results."""
        checkpoint, data = self.option("ckpt_path"), self.cli.datamodule
        if self.fit:
            self.cli.model.load_teacher()  # a missing file fails before anything is written
            self.trainer.fit(self.cli.model, datamodule=data, ckpt_path=checkpoint)
            self._after_fit()
            return
        command = getattr(self.trainer, self.cli.command)
        quiet = {} if self.cli.command == "predict" else {"verbose": False}
        command(self.cli.model, datamodule=data, ckpt_path=checkpoint, **quiet)
        if quiet and self.trainer.is_global_zero:
            show_measured(
                self.trainer.callback_metrics,
                self.cli.command,
                Path(checkpoint),
                classes=self.cli.model.data.num_classes,
                answers=next((each.answers for each in self._answers()), None),
            )
        if self.cli.command == "test":
            run, same = run_folder(Path(checkpoint)), getattr(data, "as_trained", False)
            if (changes := changed_test(run, self.cli.settings(), same_images=same)) and self.trainer.is_global_zero:
                print(f"not kept in {run}, as it is another test than that of the run: {', '.join(changes)}")
            elif not changes:
                self._keep_test(Path(checkpoint))

    def _check(self) -> None:
        """Check processes, batch size and checkpoint."""
        check_loaders(self.cli.datamodule, self.cli.command, test=bool(self.option("test")))
        check_processes(self.trainer, self.cli.datamodule if self.fit else None)
        if checkpoint := self.option("ckpt_path"):
            check_checkpoint(Path(checkpoint), self.cli.model, self._content)
            self._content = None
            run = run_folder(Path(checkpoint))
            if not self.fit and on_first_process():
                say_unfinished(Path(checkpoint))
            if self.cli.command == "test" and (run / "summary.json").is_file():
                read_summary(run)

    def _say_fresh(self) -> None:
        """Say that a recipe of fine-tuning meets a student without weights; a network of the user's may have some."""
        model = self.cli.model
        named = isinstance(model.student_config.network, str) and model.start is None
        if self.fit and self.cli.fine_tunes and named and not self.option("ckpt_path") and on_first_process():
            print(
                f"recipes/finetune is for a student with weights and {model.student_config.network} has fresh ones; "
                "set model.student.pretrained or model.student.weights, or choose another recipe",
                flush=True,
            )

    # ---------------------------------------------------------------- folder

    def choose_folder(self) -> None:
        """Choose the run's folder, and refuse one that is taken or cannot be written.

        Raises:
            ACKDError: Naming the option.
        """
        if self.option("name") is not None:
            check_name(self.option("name"))
        launched_by_us = "LOCAL_RANK" in os.environ and _RUN_NAME in os.environ
        name = os.environ[_RUN_NAME] if launched_by_us else self.cli.folder.name
        os.environ[_RUN_NAME] = name  # read by the processes that Lightning starts for DDP
        self.cli.folder = self.cli.folder.with_name(name)
        if self.fit and self.option("resume"):
            self._resume(launched_by_us)
        if not self.fit:
            self._check_evaluation()
        elif not (self.dry or launched_by_us or not on_first_process()):
            self._claim_folder()

    def _check_evaluation(self) -> None:
        command, output = self.cli.command, self.option("output")
        if not self.option("ckpt_path"):
            raise ACKDError(f"`ackd {command}` needs a run; write `ackd {command} RUN`, or set --ckpt_path FILE")
        if command == "predict":
            check_predictions(Path(output), overwrite=self.option("overwrite"))

    def _claim_folder(self) -> None:
        resumed = self.option("ckpt_path")
        if resumed and not Path(resumed).is_file():
            raise ACKDError(f"--ckpt_path {resumed} does not exist; name a checkpoint that `ackd fit` wrote")
        own = bool(resumed) and self.cli.folder.resolve() in Path(resumed).resolve().parents
        named = own or self.option("name")
        self.claim = claim(self.cli.folder.parent, self.cli.folder.name if named else None, resume=own)
        self.cli.folder = self.claim.folder
        os.environ[_RUN_NAME] = self.cli.folder.name
        if self.copy_to is None:
            return
        original, folder = copied_from(self.cli.folder), self.cli.folder.resolve()
        beside = original is not None and original.parents[1] == folder.parents[1]  # and with the same weights_dir
        wrote = same_content(self.copy_to, folder / STUDENT) and not beside
        if self.copy_to.exists() and not wrote:
            raise ACKDError(
                f"weights {self.copy_to} exist and this run would replace them; move them, choose another "
                "--weights_dir, or write none with --weights_dir null"
            )
        check_writable(self.copy_to.parent, "--weights_dir")

    def _resume(self, launched_by_us: bool) -> None:
        """Find the run to resume and its checkpoint."""
        if self.option("ckpt_path"):
            raise ACKDError("--resume and --ckpt_path both name a checkpoint; leave --ckpt_path out")
        length = Length.of(vars(self.cli.config.trainer))
        if launched_by_us:
            found = resume_from(os.environ[_RESUMED]) if _RESUMED in os.environ else None
        elif self.option("resume") == "auto":
            place, name, seed = self.cli.folder.parent, self.option("name"), self.option("seed_everything")
            found = resume_auto(place, name, seed, length)
            if found is None and not name and on_first_process():
                say_other_seeds(place, seed)
        else:
            found = resume_from(self.option("resume"), length)
            refuse_other_place(found.folder, self.cli.options)
        os.environ.pop(_RESUMED, None)
        if found is None:
            return
        check_length(found, length)
        os.environ[_RESUMED] = str(found.checkpoint)  # as the name, for the processes that Lightning starts
        os.environ[_RUN_NAME] = found.folder.name
        self.cli.folder, self._content = found.folder, found.content
        self.cli.config.ckpt_path = str(found.checkpoint)
        if on_first_process() and not launched_by_us:
            print(f"resuming from {found.checkpoint}" + (f"; {found.note}" if found.note else ""), flush=True)
            if changes := changed_settings(found.folder, started_with(found.folder), self.cli.settings()):
                schedule = any(each.startswith(_SCHEDULE) for each in changes)
                more = " (the learning rate follows the new schedule)" if schedule else ""
                print(f"settings that differ from the run's start: {', '.join(changes)}{more}", flush=True)

    # ---------------------------------------------------------------- Trainer

    def make_trainer(self) -> L.Trainer:
        """Make the Trainer with the loggers and callbacks of a run.

        Raises:
            ACKDError: When Lightning refuses the settings.
        """
        self.trainer = make_trainer(self.cli, self.cli.folder, copy_to=self.copy_to)
        if self.fit and isinstance(self.trainer.accelerator, CPUAccelerator):
            keep_freed_memory()
        return self.trainer

    # ---------------------------------------------------------------- afterwards

    def _after_fit(self) -> None:
        """Print the summary, when the progress bar has ended, and test when asked to."""
        summary = next(each for each in self.trainer.callbacks if isinstance(each, RunSummary))  # type: ignore[attr-defined]
        summary.show()
        if self.option("resume") and summary.finished is None and not self.dry and self.trainer.is_global_zero:
            print(
                f"nothing was left to train: {self.cli.folder} has reached its length; raise --trainer.max_epochs, "
                "--trainer.max_steps or --trainer.max_time, whichever ended it",
                flush=True,
            )
        if self.dry:
            print(
                f"fast_dev_run: nothing is written{' and nothing is tested' if self.option('test') else ''}", flush=True
            )
        measured = bool(getattr(self.cli.datamodule, "val_is_test", False) and summary.up_to_date)
        measured = self.trainer.strategy.broadcast(measured)  # the first process alone has a summary
        if self.option("test") and not self.dry and not measured:  # else the last epoch was measured on the test set
            self._test()
        if self.trainer.is_global_zero:
            summary.show_next(tested=bool(self.option("test")) or measured)

    def _test(self) -> None:
        """Test the last and the best checkpoint."""
        for name in ("last", "best"):
            checkpoint = self.cli.folder / "checkpoints" / f"{name}.ckpt"
            if name == "last" and not checkpoint.is_file() and self.trainer.is_global_zero:
                print(f"not tested, as there is no {checkpoint}")
            if checkpoint.is_file():
                self.trainer.test(
                    self.cli.model, datamodule=self.cli.datamodule, ckpt_path=str(checkpoint), verbose=False
                )
                self._keep_test(checkpoint)
                limit = self.option("trainer.limit_test_batches")
                part = (
                    "" if repr(limit) in ("1.0", "None") else f" on part of the test data (limit_test_batches {limit})"
                )
                if self.trainer.is_global_zero:
                    print(f"test, {name}: accuracy {float(self.trainer.callback_metrics['test/acc']):.2%}{part}")

    def _answers(self) -> list[TestAnswers]:
        return [each for each in self.trainer.callbacks if isinstance(each, TestAnswers)]  # type: ignore[attr-defined]

    def _keep_test(self, checkpoint: Path) -> None:
        """Write the accuracies of a test into the summary of its run, and its predictions beside it."""
        path = run_folder(checkpoint) / "summary.json"
        if not self.trainer.is_global_zero or not path.is_file():
            return
        measured = self.trainer.callback_metrics.items()
        values = {key: float(value) for key, value in measured if not key.startswith(("train/", "val/"))}
        try:
            for each in self._answers():
                each.write(path.parent, checkpoint.stem)
            summary = json.loads(path.read_text(encoding="utf-8"))  # now, as another test may have written meanwhile
            summary.setdefault("test", {})[checkpoint.stem] = values
            write_json(summary, path)
        except OSError as error:
            if error.errno not in NOT_PERMITTED:  # as of a run that belongs to somebody else
                raise
            print(f"the accuracy and the predictions are not kept: {not_permitted(error)}", flush=True)


@contextlib.contextmanager
def in_our_words(arguments: Sequence[str] = ()) -> Iterator[None]:
    """Show warnings as sentences, silence chatter, and raise this package's own error out of a chain of others.

    Args:
        arguments: Command line, whose names of methods are used.
    """
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    formatter = warnings.formatwarning
    with warnings.catch_warnings():
        for message in _NOT_OURS:
            warnings.filterwarnings("ignore", message)
        for category in (DeprecationWarning, FutureWarning):  # for the authors of these libraries
            warnings.filterwarnings("ignore", category=category, module=r"(jsonargparse|lightning|torch)\..*")
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # a sentence, not a place in our code
        try:
            yield
        except ValueError as error:
            ours = first_cause(error)
            if not isinstance(ours, ACKDError):
                raise
            words = as_given(ours, arguments)
            if ours is error and words == str(ours):
                raise
            raise type(ours)(words) from error
        finally:
            warnings.formatwarning = formatter


def plan(arguments: Sequence[str], *, weights: bool = True) -> ACKDCLI:
    """Read the settings of a fit and build its networks without running it.

    Args:
        arguments: Command line after ``ackd fit``.
        weights: Whether the networks must have weights; without, those that can be built so have shapes alone.

    Raises:
        ACKDError: For whatever is wrong with them.
    """
    with in_our_words(arguments):
        cli = ACKDCLI("fit", arguments)
        with contextlib.suppress(Exception):  # what needs numbers, or is wrong, is built with them
            if not weights:
                cli.build(weights=False)
                return cli
        cli.build()
        return cli


def run(command: str, arguments: Sequence[str]) -> None:
    """Run a subcommand.

    Args:
        command: fit, validate, test or predict.
        arguments: Command line after it.
    """
    with in_our_words(arguments):
        cli = ACKDCLI(command, arguments)
        if cli.prints:
            print(yaml.safe_dump(cli.settings(), sort_keys=False), end="")
        else:
            Execution(cli).run()
