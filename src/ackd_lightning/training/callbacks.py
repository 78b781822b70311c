"""What a run leaves behind: its settings, its checkpoints, a summary, the student."""

from __future__ import annotations

import csv
import functools
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning
import lightning.pytorch as L
import torch
import torch.distributed as dist
import torchvision
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from rich.console import Console
from rich.table import Table

from ackd_lightning._version import __version__
from ackd_lightning.export import export_student, peer_name, write_json
from ackd_lightning.models.zoo.complexity import count_parameters, multiply_adds
from ackd_lightning.training.health import is_dry

if TYPE_CHECKING:
    from ackd_lightning.models.teacher import FrozenTeacher
    from ackd_lightning.training.distillation import DistillationModule
    from ackd_lightning.types import NetSpec


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint of a run whose folder may have been moved: the best so far is known there, too."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint says of earlier ones, with their new places; not when they stayed elsewhere."""
        old, new = str(state_dict["dirpath"]), str(self.dirpath)

        def moved(value: Any) -> Any:
            return value.replace(old, new, 1) if isinstance(value, str) else value

        if not Path(moved(state_dict["best_model_path"])).is_file():
            super().load_state_dict(state_dict)
            return
        kept = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**{key: moved(each) for key, each in state_dict.items()}, "best_k_models": kept})


def checkpoints(folder: Path, *, select: bool) -> list[ModelCheckpoint]:
    """Checkpoints of a run: the last epoch, and the one with the best validation accuracy.

    Args:
        folder: of the checkpoints.
        select: False when the run looks at test data, on which nothing may be selected: then only the last is kept.
    """
    last = RunCheckpoint(
        folder, filename="last", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
    )
    if not select:
        return [last]
    best = RunCheckpoint(
        folder, filename="best", monitor="val/acc", mode="max", save_top_k=1, enable_version_counter=False
    )
    return [last, best]


@functools.cache
def commit() -> str | None:
    """The git commit of this package's source, ``+`` behind it when files were changed; None where there is none."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not git("ls-files", __file__):
            return None  # installed somewhere below another project's repository
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    source = commit()
    return {
        "ackd_lightning": __version__,
        **({"commit": source} if source else {}),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
    }


def device_name(module: L.LightningModule) -> str:
    """The hardware in words.

    Args:
        module: trained on it.
    """
    if module.device.type == "cuda":
        return torch.cuda.get_device_name(module.device)
    return f"CPU, {torch.get_num_threads()} threads" if module.device.type == "cpu" else str(module.device)


class _KeepingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Go on with a file that is there; Lightning's own deletes it, also when a run is resumed."""
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class CurvesFile(CSVLogger):
    """``metrics.csv`` of a run; a resumed run adds to it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer."""
        if self._experiment is None:
            self._experiment = _KeepingWriter(self.log_dir)
        return cast(ExperimentWriter, self._experiment)


class RunConfig(SaveConfigCallback):
    """The resolved settings of a run: ``config.yaml`` in its folder, and into every logger."""

    def __init__(self, parser: Any, config: Any, *, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write once, on the first process, when a fit starts."""
        text = self.parser.dump(self.config, skip_none=False)
        if stage == "fit":
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(text, encoding="utf-8")
            for logger in trainer.loggers:
                if not isinstance(logger, CSVLogger):
                    logger.log_hyperparams({"cli": yaml.safe_load(text)})


class EpochLine(L.Callback):
    """One line an epoch for logs and terminals without a progress bar: losses, accuracy, time left."""

    def __init__(self) -> None:
        self.started = 0.0
        self.first = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.started, self.first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        cut_short = cast("DistillationModule", pl_module).means.compute()  # by every process; not logged yet
        if not trainer.is_global_zero:
            return
        values = {**trainer.callback_metrics, **cut_short}
        done = trainer.current_epoch - self.first + 1
        elapsed = time.monotonic() - self.started
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        parts = [f"epoch {trainer.current_epoch + 1}" + (f"/{total}" if total else "")]
        if "train/loss" in values:
            parts.append(f"loss {float(values['train/loss']):.3f}")
        for stage in ("val", "test"):
            for learner in ("", "ensemble_"):
                if f"{stage}/{learner}acc" in values:
                    label = f"{stage} {learner.rstrip('_') + ' ' if learner else ''}acc"
                    parts.append(f"{label} {float(values[f'{stage}/{learner}acc']):.2%}")
        parts.append(f"{elapsed / done:.1f} s/epoch")
        if total:
            left = (total - trainer.current_epoch - 1) * elapsed / done
            parts.append(f"{left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f} left")
        print("  ".join(parts), flush=True)


def _teacher_facts(teacher: FrozenTeacher, input_size: int) -> dict[str, Any]:
    measured = teacher.metadata.get("measured_acc")
    return {
        "model": teacher.metadata.get("model", type(teacher.network).__name__),
        "acc": float(measured) if measured else None,
        "sha256": teacher.metadata.get("sha256"),
        "parameters": count_parameters(teacher.network),
        "multiply_adds": multiply_adds(teacher.network, teacher.input_size or input_size),
    }


class RunSummary(L.Callback):
    """At the end of a fit: ``summary.json``, the student as a file, and a table for the screen.

    Args:
        folder: of the run.
        config: name of its configuration.
        publish: a second place for the student's weights, for runs that train teachers.
    """

    def __init__(self, folder: Path, *, config: str, publish: Path | None = None) -> None:
        self.folder, self.config, self.publish = folder, config, publish
        self.started = 0.0
        self.seconds = 0.0
        self.measured_at = -1
        self.finished: tuple[dict[str, Any], dict[str, str]] | None = None
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock and say what is trained."""
        self.started = time.monotonic()
        if not trainer.is_global_zero:
            return
        module = cast("DistillationModule", pl_module)
        learners = "".join(f" + {spec}" for spec in module.student.specs)
        method = type(module.method).__name__
        print(
            f"{method}: student {self._student_name(module)}{learners} "
            f"({module.training_parameters():,} parameters in training), files in {self.folder}",
            flush=True,
        )
        if module.method.layers and module.teacher_spec is not None:

            def shape(spec: NetSpec, stage: int) -> str:
                return f"F{stage} ({' x '.join(map(str, spec.features[stage]))})"

            pairs = [
                f"{shape(module.spec, ours)} - {shape(module.teacher_spec, theirs)}"
                for ours, theirs in module.method.layers
            ]
            print(f"layers, student - teacher: {', '.join(pairs)}", flush=True)

    def _student_name(self, module: DistillationModule) -> str:
        name = module.hparams.get("student")
        return name if isinstance(name, str) else type(module.student.plain()).__name__

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the last accuracies and those of the best epoch."""
        if trainer.sanity_checking:
            return
        values = {
            key: float(value)
            for key, value in trainer.callback_metrics.items()
            if key.startswith(("val/", "test/", "learners/", "attention/"))
        }
        self.last = {**values, "epoch": float(trainer.current_epoch + 1)}
        self.measured_at = trainer.global_step
        if values.get("val/acc", -1.0) > self.best.get("val/acc", -1.0):
            self.best = self.last

    @property
    def up_to_date(self) -> bool:
        """Whether the last accuracies are those of the last step's weights."""
        return self.finished is not None and self.last.get("epoch") == self.finished[0]["epochs"]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in order to report the best of all."""
        return {"best": self.best, "seconds": self.seconds + time.monotonic() - self.started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.best, self.seconds = state_dict["best"], state_dict["seconds"]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and print."""
        if not trainer.is_global_zero or is_dry(trainer):
            return
        module = cast("DistillationModule", pl_module)
        seconds = self.seconds + time.monotonic() - self.started
        kept = module.kept_network()
        stage = "test" if "test/acc" in self.last else "val"
        summary: dict[str, Any] = {
            "config": self.config,
            "run": str(self.folder),
            "method": type(module.method).__name__,
            "student": self._student_name(module),
            "seed": module.seed,
            "data": type(getattr(trainer, "datamodule", None)).__name__,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "seconds": round(seconds, 1),
            "skipped_steps": module.guard.skipped,
            "shown": stage,
            "last": self.last,
            "best": self.best,
            "training_parameters": module.training_parameters(),
            "parameters": count_parameters(kept),
            "multiply_adds": multiply_adds(kept, module.input_size),
            "plain_parameters": count_parameters(module.student.plain()),
            "learners": list(module.student.specs),
            "learner_parameters": [count_parameters(each) for each in module.student.branches],
            "precision": str(trainer.precision),
            "device": device_name(module),
            "versions": versions(),
        }
        if module.teachers.frozen:
            summary["teacher"], *others = [_teacher_facts(each, module.input_size) for each in module.teachers.frozen]
            summary |= {"other_teachers": others} if others else {}
        files = {"settings": "config.yaml", "curves": "metrics.csv", "checkpoints": "checkpoints"}
        last = self.folder / "checkpoints" / "last.ckpt"
        if last.is_file() and isinstance(module.hparams.get("student"), str):
            # only what was measured on the very weights that are written
            known = self.last if self.measured_at == trainer.global_step else {}
            facts = {key.replace("/", "_"): f"{value:.6f}" for key, value in known.items() if key.endswith("/acc")}
            targets = [self.folder / "student.safetensors", *([self.publish] if self.publish else [])]
            for target in targets:
                export_student(last, target, extra={**facts, "weights": "last epoch"}, overwrite=True)
            files["student"] = "student.safetensors"
        write_json(summary, self.folder / "summary.json")  # last: it says that the run is finished
        self.finished = (summary, files)

    @staticmethod
    def _size(learner: str, summary: dict[str, Any]) -> str:
        """Parameters of a network that can be taken out; of others nothing is shown."""
        if not learner:
            return f"{summary['parameters']:,}"
        number = int(learner.removeprefix("aux")) if learner.startswith("aux") else -1
        is_peer = number >= 0 and peer_name(summary["learners"][number], summary["student"]) is not None
        return f"{summary['learner_parameters'][number]:,}" if is_peer else ""

    @staticmethod
    def _label(learner: str, summary: dict[str, Any]) -> str:
        """How a network is called in the table."""
        if not learner:
            return f"target {summary['student']}"
        number = int(learner.removeprefix("aux")) if learner.startswith("aux") else -1
        name = peer_name(summary["learners"][number], summary["student"]) if number >= 0 else None
        return f"{learner} ({name}, learner {number + 1})" if name else learner

    def show(self) -> None:
        """Print accuracies of every network, last and best, and where the files are; nothing before the fit's end."""
        if self.finished is None:
            return
        summary, files = self.finished
        stage = summary["shown"]
        note = "test data, nothing selected on it" if stage == "test" else "validation data"
        table = Table(title=f"{self.config}, seed {summary['seed']}: accuracy in % on {note}")
        for column, justify in (("network", "left"), ("last", "right"), ("best", "right"), ("parameters", "right")):
            table.add_column(column, justify=cast("Any", justify))

        def percent(values: dict[str, float], key: str) -> str:
            return f"{100 * values[key]:.2f}" if key in values else "not selected" if not values else "-"

        for teacher in [summary[key] for key in ("teacher",) if key in summary] + summary.get("other_teachers", []):
            shown = "-" if teacher["acc"] is None else f"{100 * teacher['acc']:.2f}"
            table.add_row(f"teacher {teacher['model']}", shown, "", f"{teacher['parameters']:,}")
        keys = [key for key in summary["last"] if key.startswith(f"{stage}/") and key.endswith("acc")]
        for key in sorted(keys, key=lambda key: (key.count("_"), key)):
            learner = key.removeprefix(f"{stage}/").removesuffix("acc").rstrip("_")
            label = self._label(learner, summary)
            size = self._size(learner, summary)
            table.add_row(label, percent(summary["last"], key), percent(summary["best"], key), size)
        Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100).print(table)
        best_epoch = summary["best"].get("epoch")
        when = f", best in epoch {best_epoch:.0f}" if best_epoch else ""
        print(f"{summary['epochs']} epochs in {summary['seconds']:.0f} s on {summary['device']}{when}")
        if summary["skipped_steps"]:
            print(f"{summary['skipped_steps']} steps were skipped, as their loss was not finite")
        if summary["plain_parameters"] != summary["parameters"]:
            print(
                f"the student keeps a head of its method: {summary['parameters']:,} parameters instead of "
                f"{summary['plain_parameters']:,}"
            )
        print(f"{summary['run']}: {', '.join(files.values())}")
        if self.publish:
            print(f"weights for later runs: {self.publish}")


class PredictionFile(BasePredictionWriter):
    """``ackd predict``: one line of CSV an image, in the order of the images, however many processes there are.

    Args:
        path: of the CSV file.
    """

    COLUMNS = ("index", "target", "prediction", "probability")

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Write index, target, prediction and probability; the first process writes for all."""
        rows = [
            row for batch in predictions for row in zip(*(batch[key].tolist() for key in self.COLUMNS), strict=True)
        ]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.gather_object(rows, parts if trainer.is_global_zero else None)
            if not trainer.is_global_zero:
                return
            rows = sorted(row for part in parts for row in part)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(self.COLUMNS)
            writer.writerows(rows)
        print(f"predictions: {self.path}")
