"""``ackd demo``: the whole workflow on data that needs no download, in minutes on a CPU."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from ackd_lightning.commands.compare import compare, draw_curves
from ackd_lightning.commands.export import export_command
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import run
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.runs.console import show_table
from ackd_lightning.runs.files import STUDENT, read_summary

TEACHER = "digits_resnet20"
PAIR = "digits_resnet20_resnet8"
METHODS = ("ce", "kd", "ackd")
PER_CLASS = 12
"""Training images of each digit for the students: few enough that a student is visibly worse than its teacher."""
EPOCHS = {"teacher": 15, "student": 60}
"""Epochs of a run; an epoch of the teacher has nine times as many images."""


def _one(command: str, arguments: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        run(command, arguments)


def demo(out: str = "demo", *, seeds: int = 3, epochs: int | None = None) -> None:
    """Train a teacher, then students alone, with KD and with ACKD; test, compare, draw and export.

    Args:
        out: Folder for runs, log, figure and student.
        seeds: Number of students per method.
        epochs: Epochs of every run; None: 15 for the teacher, 60 for students.

    Raises:
        ACKDError: When the folder holds an earlier demo, or a number is below 1.
    """
    for name, value in (("seeds", seeds), ("epochs", epochs)):
        if value is not None and value < 1:
            raise ACKDError(f"--{name} is {value}; use 1 or more")
    folder = Path(out)
    if (folder / "runs").exists():
        raise ACKDError(f"{folder} holds an earlier demo; remove it or choose another --out")
    check_writable(folder, "--out")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    started = time.monotonic()
    weights = folder / "weights"
    # one process: others would start the whole demo again
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.devices", "1"]
    shared = ["--runs_dir", str(folder / "runs"), *quiet]
    few = ["--data.max_per_class", str(PER_CLASS), "--data.batch_size", "16", "--trainer.check_val_every_n_epoch", "2"]
    if epochs is not None:
        few += ["--model.teacher.gate", "warn"]
    print(f"digits: all training images for the teacher, {10 * PER_CLASS} of them for the students", flush=True)
    print(f"one line per run, full output in {log}", flush=True)

    plan = [(TEACHER, "", 0)] + [(PAIR, method, seed) for seed in range(seeds) for method in METHODS]
    for number, (config, method, seed) in enumerate(plan, start=1):
        begin = time.monotonic()
        configs = ["--config", config, *(["--config", method] if method else ["--weights_dir", str(weights)])]
        length = epochs or EPOCHS["student" if method else "teacher"]
        own = [*few, "--model.teacher.weights", str(weights / f"{TEACHER}.safetensors")] if method else []
        own += ["--trainer.max_epochs", str(length)]
        own += ["--model.lr_scheduler.milestones", f"[{length // 2}, {length * 4 // 5}]"]
        name = f"seed{seed}"
        _one("fit", [*configs, "--name", name, "--seed_everything", str(seed), *shared, *own], log)
        place = folder / "runs" / (f"{config}+{method}" if method else config) / name
        _one("test", [str(place), *quiet], log)
        accuracy = read_summary(place)["test"]["last"]["test/acc"]
        what = f"student resnet8, {method}, seed {seed}" if method else "teacher resnet20"
        seconds = time.monotonic() - begin
        print(f"[{number}/{len(plan)}] {what}: test accuracy {accuracy:.2%} ({seconds:.0f} s)", flush=True)

    runs = [folder / "runs"]
    show_table(compare(runs))
    print("kd has the weights 0.1 for cross-entropy and 0.9 for the teacher; 1 and 1 are as common, and often better")
    print("this checks the installation: 10 classes and few images do not compare methods (docs/results.md)")
    draw_curves(runs, folder / "curves.png")
    student = folder / STUDENT
    export_command(str(folder / "runs" / f"{PAIR}+ackd" / "seed0"), which="last", out=str(student), overwrite=False)
    print(f"figure {folder / 'curves.png'}, ACKD student {student}, {time.monotonic() - started:.0f} s in total")
