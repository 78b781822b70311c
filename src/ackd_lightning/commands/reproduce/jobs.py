"""One planned run, its state, and whether an existing run was made with the same settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ackd_lightning.commands.reproduce.networks import Networks
from ackd_lightning.config.experiment import differing, experiment_settings, moved_data
from ackd_lightning.config.yaml_files import read_yaml
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.run_settings import started_with
from ackd_lightning.models.weights import digest
from ackd_lightning.runs.files import STUDENT, read_checkpoint, read_summary


@dataclass(frozen=True)
class Job:
    """One run of ``ackd fit``.

    Attributes:
        title: Printed title.
        pair: Name of the pair; the first of them for a teacher that several pairs share.
        row: Name of the row; empty for teachers and assistants.
        kind: ``student``, ``teacher``, ``early_stopped`` or ``assistant``.
        seed: Seed of the run.
        arguments: Command line of ``ackd fit``.
        folder: Folder of the run.
        needs: Folders of the runs whose networks it learns from.
        settings: Dotted settings that define the experiment, without the seed.
        config: All settings, the content of the run's ``config.yaml``.
        images: Data module.
        networks: Sizes of the networks.
        sources: Weight files of the networks that it learns from.
    """

    title: str
    pair: str
    row: str
    kind: str
    seed: int
    arguments: tuple[str, ...]
    folder: Path
    needs: tuple[Path, ...]
    settings: dict[str, Any]
    config: dict[str, Any]
    images: ImageDataModule
    networks: Networks
    sources: tuple[Path, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the run has finished."""
        return (self.folder / "summary.json").is_file()

    @property
    def checkpoint(self) -> Path | None:
        """Some checkpoint of an interrupted run; `--resume` chooses which one is read."""
        found = list(self.folder.glob("checkpoints/*.ckpt"))
        return found[0] if found and not self.finished else None

    @property
    def student_file(self) -> Path:
        """Weight file of the trained network."""
        return self.folder / STUDENT

    @property
    def epochs(self) -> int:
        """Length of the run in epochs."""
        return int(self.settings.get("trainer.max_epochs") or 0)

    @property
    def config_hash(self) -> str:
        """Short hash of the settings, equal for runs that differ only in their seed."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def state(self) -> str:
        """``finished``, ``to continue`` or ``to do``."""
        return "finished" if self.finished else "to continue" if self.checkpoint else "to do"


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Write dotted settings as a command line.

    Args:
        settings: Values by dotted name.

    Examples:
        >>> as_arguments({"trainer.max_epochs": 3, "data.mean": [0.5, 0.4], "model.student": "resnet8"})
        ['--trainer.max_epochs', '3', '--data.mean', '[0.5, 0.4]', '--model.student', 'resnet8']
    """
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


def changed(job: Job) -> tuple[str, str, str] | None:
    """Return the first setting in which an existing run differs from the plan: name, value there, planned value.

    None for a run with the planned settings, and where there is no run.

    Settings that only one side has (those of another version) are not compared.

    Args:
        job: Planned run.
    """
    path = job.folder / "config.yaml"
    if not path.is_file() or job.state() == "to do":
        return None
    config = read_yaml(path) or {}
    if (roots := moved_data(started_with(job.folder), job.config)) is not None:
        return "data.root", *roots
    for name, (first, second) in differing(experiment_settings(config), job.settings).items():
        return name, json.dumps(first), json.dumps(second)
    return _changed_teacher(job)


def _changed_teacher(job: Job) -> tuple[str, str, str] | None:
    """The same for the networks that a run learned from."""
    if not job.sources:
        return None
    if job.finished:
        summary = read_summary(job.folder)
        learned_from = [each.get("sha256") for each in (summary.get("teacher", {}), *summary.get("other_teachers", []))]
    else:
        assert job.checkpoint is not None  # a run without one is to do
        learned_from = read_checkpoint(job.checkpoint)["ackd_lightning"].get("teacher_sha256", [])
    for source, known in zip(job.sources, learned_from, strict=False):
        if known is None:
            continue
        if not source.is_file():
            return "a teacher", f"{known[:12]}", f"{source}, which does not exist"
        if (now := digest(source)) != known:
            return "a teacher", known[:12], f"{source} ({now[:12]})"
    return None


def check_unchanged(job: Job) -> None:
    """Refuse an existing run that was made with other settings.

    Args:
        job: Planned run.

    Raises:
        ACKDError: When a setting differs.
    """
    if (change := changed(job)) is not None:
        key, there, planned = change
        raise ACKDError(
            f"run {job.folder} was made with {key} = {there} and would now have {planned}; "
            "choose another --out, or remove that run"
        )


def union(jobs: Iterable[Job]) -> dict[Path, Job]:
    """Collect the runs of several tables by folder; tables that need the same run share it.

    Args:
        jobs: Planned runs.

    Raises:
        ACKDError: When two tables plan one folder with different settings.
    """
    found: dict[Path, Job] = {}
    for job in jobs:
        there = found.setdefault(job.folder, job)
        for key in sorted(there.settings.keys() | job.settings.keys()):
            first, second = (json.dumps(each.settings.get(key)) for each in (there, job))
            if first != second:
                raise ACKDError(
                    f"two tables would share the run {job.folder}, with {key} = {first} in one and {second} in the "
                    "other; give the row the same settings in both, or run each table with its own --out"
                )
    return found
