"""What a run leaves behind: its settings, its checkpoints, a summary, the student."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as L
from rich.console import Console
from rich.table import Table

from ackd_lightning.callbacks.health import is_dry
from ackd_lightning.models.zoo.complexity import count_parameters, multiply_adds
from ackd_lightning.runs.export import export_student, peer_name
from ackd_lightning.runs.files import write_json
from ackd_lightning.runs.versions import device_name, versions

if TYPE_CHECKING:
    from ackd_lightning.callbacks.protocol import TrainingModule
    from ackd_lightning.models.teacher import FrozenTeacher
    from ackd_lightning.types import NetSpec


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
        module = cast("TrainingModule", pl_module)
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

    def _student_name(self, module: TrainingModule) -> str:
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
        module = cast("TrainingModule", pl_module)
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
            "multiply_adds": multiply_adds(kept, module.data.input_size),
            "plain_parameters": count_parameters(module.student.plain()),
            "learners": list(module.student.specs),
            "learner_parameters": [count_parameters(each) for each in module.student.branches],
            "precision": str(trainer.precision),
            "device": device_name(module.device),
            "versions": versions(),
        }
        if module.teachers.frozen:
            summary["teacher"], *others = [_teacher_facts(each, module.data.input_size) for each in module.teachers.frozen]
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
