"""Results of a run: ``summary.json``, the student as a file, and a table on the screen."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ackd_lightning.callbacks.accuracy_table import accuracy_table
from ackd_lightning.callbacks.checkpoints import WholeCheckpoints
from ackd_lightning.callbacks.health import is_fast_dev_run
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.loaders import data_of
from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.models.copies import name_of
from ackd_lightning.models.preprocessing import channels_of
from ackd_lightning.models.zoo.complexity import count_parameters, multiply_adds
from ackd_lightning.runs.answers import answers_file
from ackd_lightning.runs.console import show_table
from ackd_lightning.runs.export import export_student
from ackd_lightning.runs.files import (
    CURVES,
    LEARNERS,
    STUDENT,
    exports,
    is_older,
    measured_last,
    read_summary,
    same_content,
    write_json,
)
from ackd_lightning.runs.versions import device_name, versions
from ackd_lightning.writing import whole_file

if TYPE_CHECKING:
    from ackd_lightning.callbacks.protocol import TrainingModule
    from ackd_lightning.models.teacher import FrozenTeacher
    from ackd_lightning.types import NetSpec


class RunSummary(L.Callback):
    """Write ``summary.json`` and the student at the end of a fit, and print a table.

    ``summary.json`` is written last: a folder that has it is a finished run.

    Args:
        folder: Folder of the run.
        config: Name of its configuration.
        copy_to: Second file that gets the student's weights, for runs that train teachers; None for no copy.
    """

    def __init__(self, folder: Path, *, config: str, copy_to: Path | None = None) -> None:
        self.folder, self.config, self.copy_to = folder, config, copy_to
        self.started = 0.0
        self.seconds = 0.0
        # counted before the fit: the hooks of a profiler cannot be copied, and nothing may fail after the last epoch
        self.multiply_adds = 0
        self.teacher_adds: list[int] = []
        self.measured_at, self.epochs = -1, 0
        self.images: dict[str, int] = {}
        self.earlier_stands = False  # whether what an earlier part of the run measured is that of its checkpoints
        self.finished: tuple[dict[str, Any], dict[str, str]] | None = None
        self.export_options = ""
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, count, and print what is trained."""
        self.started = time.monotonic()
        if not trainer.is_global_zero:
            return
        module = cast("TrainingModule", pl_module)
        self.multiply_adds = multiply_adds(module.kept_network(), module.data.input_size, module.data.image_shape[0])
        learners = "".join(f" + {spec}" for spec in module.student.specs)
        images = data_of(trainer)
        prepared = isinstance(images, ImageDataModule) and images.preprocessing["pixels"] == "uint8"
        self.export_options = " --with-preprocessing" if prepared else ""
        self.export_options += "" if module.student_config.quantization is None else " --int8"
        method = type(module.method).__name__
        if module.model_name is None and self.copy_to is not None:
            print(
                f"no weights in {self.copy_to}, as the student is a network of your own; "
                f"{self.folder / 'checkpoints' / 'last.ckpt'} fills one",
                flush=True,
            )
            self.copy_to = None
        files = "" if is_fast_dev_run(trainer) else f", files in {self.folder}"
        print(
            f"{method}: student {name_of(module.student)}{learners} "
            f"({module.training_parameters():,} parameters in training){files}",
            flush=True,
        )
        if module.method.layers and module.teacher_spec is not None:
            ours, theirs = module.spec, module.teacher_spec
            pairs = [f"{_shape(ours, first)} - {_shape(theirs, second)}" for first, second in module.method.layers]
            print(f"layers, student - teacher: {', '.join(pairs)}", flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the teachers."""
        if trainer.is_global_zero and not is_fast_dev_run(trainer):
            self._count_teachers(pl_module)
            self.earlier_stands = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remove what was measured before a run is trained longer, when a new checkpoint is written and complete."""
        if self.earlier_stands and trainer.is_global_zero:
            if isinstance(writer := trainer.strategy.checkpoint_io, WholeCheckpoints):
                writer.before_replacing = self._forget
            else:
                self._forget()

    def _forget(self) -> None:
        """Remove summary and answers of the earlier part of a run."""
        self.earlier_stands = False
        for file in (self.folder / "summary.json", *(answers_file(self.folder, which) for which in ("last", "best"))):
            file.unlink(missing_ok=True)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the epochs, of which a limit of steps may end the last one early."""
        self.epochs = trainer.current_epoch + 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of the last epoch and those of the best one."""
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics.items()
        values = {key: float(value) for key, value in metrics if key.startswith(("val", "test"))}
        self.last = {**values, "epoch": float(trainer.current_epoch + 1)}
        self.measured_at, self.images = trainer.global_step, _evaluation_images(trainer)
        if values.get("val/acc", -1.0) > self.best.get("val/acc", -1.0):
            self.best = self.last

    @property
    def up_to_date(self) -> bool:
        """Whether the last metrics were measured with the weights of the last step."""
        return self.finished is not None and bool(measured_last(self.finished[0]))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs in order to report the best epoch and the time of the whole run."""
        measured = {"last": self.last, "measured_at": self.measured_at, "images": self.images}
        place = str(self.folder.absolute())
        return {"best": self.best, "seconds": self._elapsed(), "epochs": self.epochs, "folder": place, **measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the result of `state_dict`, and measure from here.

        The best epoch of another run, whose best checkpoint is not here, is left out.
        """
        here = str(self.folder.absolute())
        before = state_dict.get("folder", here)
        own = before == here or (self.folder / "checkpoints/best.ckpt").is_file()
        if not own and state_dict["best"]:
            rank_zero_only(print)(
                f"the best epoch of {before}, of which no checkpoint is here, is not counted", flush=True
            )
        self.best, self.seconds = state_dict["best"] if own else {}, state_dict["seconds"]
        self.last, self.measured_at = state_dict["last"], state_dict["measured_at"]
        self.images, self.epochs = state_dict["images"], state_dict["epochs"]
        self.started = self.started and time.monotonic()

    def _elapsed(self) -> float:
        """Return the seconds of the whole run; a finder of Lightning's saves a checkpoint before the clock starts."""
        return self.seconds + (time.monotonic() - self.started if self.started else 0.0)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the student and the summary, before any other callback or a profiler can fail."""
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        module = cast("TrainingModule", pl_module)
        summary = self._summary(trainer, module)
        files = {"settings": "config.yaml", "metrics": "metrics.csv", "checkpoints": "checkpoints"}
        files |= {"curves": CURVES, "learners": LEARNERS}
        last = self.folder / "checkpoints" / "last.ckpt"
        if module.model_name is not None and not last.is_file():
            if any(isinstance(each, ModelCheckpoint) for each in trainer.checkpoint_callbacks):
                rank_zero_warn(f"the student was not exported, as there is no {last}")
        elif module.model_name is not None:
            # only metrics that were measured with the very weights that are written
            known = self.last if summary["last_is_final"] else {}
            measured = {key.replace("/", "_"): f"{value:.6f}" for key, value in known.items() if key.endswith("/acc")}
            measured |= {f"{part}_count": str(count) for part, count in summary["images"].items() if known}
            own, extra = self.folder / STUDENT, {**measured, "weights": "last epoch"}
            replaces = self.copy_to is not None and same_content(self.copy_to, own)  # of a run that is trained longer
            try:
                export_student(last, own, extra=extra, overwrite=True)
                files["student"] = own.name
                self._copy(own, replace=replaces)
            except ACKDError as error:  # what the run has measured is kept
                rank_zero_warn(f"the student was not exported: {error}")
        if "student" not in files:
            self.copy_to = None
        before: dict[str, Any] = {}
        with contextlib.suppress(ACKDError):
            before = read_summary(self.folder) if (self.folder / "summary.json").is_file() else {}
        if self.earlier_stands and before.get("steps") == summary["steps"]:  # there was nothing left to train
            summary |= {"test": before["test"]} if "test" in before else {}
        elif self.earlier_stands:
            self._forget()
        write_json(summary, self.folder / "summary.json")  # last, as it marks the run as finished
        self.finished = (summary, files)

    def _copy(self, own: Path, *, replace: bool) -> None:
        """Copy the student for later runs, or say why not; nothing without ``copy_to``."""
        if self.copy_to is None:
            return
        try:
            with whole_file(self.copy_to, replace=replace) as partial:
                shutil.copyfile(own, partial)
        except OSError as error:
            kept = isinstance(error, FileExistsError)
            why = "was written by another run meanwhile and is not replaced" if kept else f"was not written ({error})"
            rank_zero_warn(f"{self.copy_to} {why}; this run's weights are {own}")
            self.copy_to = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write them for a run that was stopped after its last epoch and before this, and has nothing left to train."""
        if trainer.global_step == 0 and trainer.num_training_batches == 0 and trainer.limit_train_batches != 0:
            size = getattr(data_of(trainer), "batch_size", None)
            raise ACKDError(
                f"batch_size is {size} and there are fewer training images, so that nothing was trained; set a smaller "
                "batch_size, or limit the callback that has chosen it"
            )
        if self.finished is None and not (self.folder / "summary.json").is_file():
            self._count_teachers(pl_module)
            self.on_train_end(trainer, pl_module)

    def _count_teachers(self, pl_module: L.LightningModule) -> None:
        module = cast("TrainingModule", pl_module)
        self.teacher_adds = [
            multiply_adds(
                each.network,
                each.input_size or module.data.input_size,
                channels_of(each.network, each.given, module.data.image_shape[0]),
            )
            for each in module.teachers.frozen
        ]

    def _summary(self, trainer: L.Trainer, module: TrainingModule) -> dict[str, Any]:
        network, data = module.kept_network(), data_of(trainer)
        names = getattr(data, "class_names", None)
        summary: dict[str, Any] = {
            "config": self.config,
            "run": str(self.folder),
            "method": type(module.method).__name__,
            "student": name_of(module.student),
            "seed": module.seed,
            "data": type(data).__name__,
            "class_names": list(names) if names else None,
            "epochs": self.epochs,
            "steps": trainer.global_step,
            "seconds": round(self._elapsed(), 1),
            "skipped_steps": module.guard.skipped,
            "shown": "test" if "test/acc" in self.last else "val",
            "limit_val_batches": trainer.limit_val_batches,
            "images": self.images,
            "last": self.last,
            "measured_at": self.measured_at,
            # whether it is the accuracy of the student's last weights, in the precision that they are kept in
            "last_is_final": self.measured_at == trainer.global_step and not module.student_config.quantization,
            "best": self.best,
            "training_parameters": module.training_parameters(),
            "parameters": count_parameters(network),
            "multiply_adds": self.multiply_adds,
            "plain_parameters": count_parameters(module.student.plain()),
            "learners": list(module.student.specs),
            "learner_parameters": [count_parameters(each) for each in module.student.branches],
            "precision": str(trainer.precision),
            "device": device_name(module.device),
            "versions": versions(),
        }
        if self.teacher_adds:
            first, *others = map(_teacher_summary, module.teachers.frozen, self.teacher_adds)
            summary |= {"teacher": first, **({"other_teachers": others} if others else {})}
        return summary

    def show(self) -> None:
        """Print the accuracy of every network and where the files are; nothing before the end of the fit."""
        if self.finished is None:
            return
        summary, files = self.finished
        if summary["last"].keys() - {"epoch"}:
            show_table(accuracy_table(summary))
        else:
            print("no accuracy: the run had no validation")
        best_epoch = summary["best"].get("epoch")
        when = f", best in epoch {best_epoch:.0f}" if best_epoch else ""
        print(f"{count_of(summary['epochs'], 'epoch')} in {summary['seconds']:.0f} s on {summary['device']}{when}")
        if summary["skipped_steps"]:
            print(f"{summary['skipped_steps']} steps were skipped, as their loss was non-finite")
        if summary["plain_parameters"] != summary["parameters"]:
            print(
                f"the student keeps the head of its method: {summary['parameters']:,} parameters instead of "
                f"{summary['plain_parameters']:,}"
            )
        print(f"{summary['run']}: {', '.join(name for name in files.values() if (self.folder / name).exists())}")
        if self.copy_to:
            print(f"weights of the last epoch, for later runs: {self.copy_to}")
        for file in (each for each, checkpoint in exports(self.folder).items() if is_older(each, checkpoint)):
            print(f"{file} was exported before the run ended; export it again with --overwrite")

    def show_next(self, *, tested: bool) -> None:
        """Print the commands that use the run.

        Args:
            tested: Whether its accuracy on the test set is known.
        """
        if self.finished is None:
            return
        run = shlex.quote(str(self.finished[0]["run"]))
        taught = [("ackd fit --config STUDENT.yaml", f"a student of this teacher (teacher.weights {self.copy_to})")]
        steps = taught if self.copy_to else []
        steps += [] if tested else [(f"ackd test {run}", "accuracy on the test set, once every choice is made")]
        steps += [
            (f"ackd report {run}", "a page: accuracy, mistakes, calibration, size, speed"),
            (f"ackd export {run} --format onnx{self.export_options}", "the student as a file for a device"),
        ]
        width = max(len(command) for command, _ in steps)
        print("next:", *(f"  {command:<{width}}  # {what}" for command, what in steps), sep="\n", flush=True)


def _evaluation_images(trainer: L.Trainer) -> dict[str, int]:
    """Number of images that the accuracy in validation was measured on, by part; nothing when it is not known."""
    dataset = getattr(trainer.val_dataloaders, "dataset", None)
    if dataset is None or not hasattr(dataset, "__len__") or repr(trainer.limit_val_batches) != "1.0":
        return {}
    part = "test" if getattr(data_of(trainer), "val_is_test", False) else "val"
    return {part: len(dataset)}


def _shape(spec: NetSpec, stage: int) -> str:
    shape = f" ({' x '.join(map(str, spec.features[stage]))})" if spec.features else ""
    return f"F{stage}{shape}"


def _teacher_summary(teacher: FrozenTeacher, adds: int) -> dict[str, Any]:
    measured = teacher.metadata.get("measured_acc")
    return {
        "model": teacher.name,
        "acc": float(measured) if measured else None,
        "sha256": teacher.metadata.get("sha256"),
        "parameters": count_parameters(teacher.network),
        "multiply_adds": adds,
    }
