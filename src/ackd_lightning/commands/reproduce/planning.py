"""Which runs a table needs, in which order, and which of them are done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ackd_lightning.commands.reproduce.tables import Pair, Row, TableSpec, TeacherKind
from ackd_lightning.config.experiment import experiment_settings
from ackd_lightning.config.files import find_config, load_configs
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import PlannedRun
from ackd_lightning.launch.execute import plan as plan_fit
from ackd_lightning.methods.base import from_description
from ackd_lightning.models.weights import digest
from ackd_lightning.runs.files import read_summary
from ackd_lightning.training.module import DistillationModule

_TEACHER_SEED = 0
"""One teacher and one assistant serve all seeds of the students."""


_SAMPLE = 64
"""Images with which a method's memory of the training set is measured."""


@dataclass(frozen=True)
class Networks:
    """What an estimate has to know of a run's networks, which themselves are not kept: a plan may have hundreds.

    Attributes:
        student: name, learners included.
        teacher: name; None for a method without one.
        input_size: side of the images.
        num_classes: K.
        trained: parameters that are trained.
        kept: parameters of the plain student.
        bytes_per_image: what the method remembers of every training image.
    """

    student: str
    teacher: str | None
    input_size: int
    num_classes: int
    trained: int
    kept: int
    bytes_per_image: float

    @classmethod
    def of(cls, module: DistillationModule) -> Networks:
        """Read them off a module, whose method gets a small memory in passing.

        Args:
            module: as planned.
        """
        method, names = module.method, module.hparams

        def size() -> int:
            return sum(each.nbytes for each in method.state_dict().values())

        trained = sum(each.numel() for each in (*module.student.parameters(), *method.parameters()))
        before = size()
        if method.needs_targets:
            method.set_targets(torch.arange(_SAMPLE) % module.num_classes)
        return cls(
            student=f"{names['student']} {module.student.specs}",
            teacher=str(names["teacher"]) if method.needs_teacher else None,
            input_size=module.input_size,
            num_classes=module.num_classes,
            trained=trained,
            kept=sum(each.numel() for each in module.student.plain().parameters()),
            bytes_per_image=(size() - before) / _SAMPLE,
        )


@dataclass(frozen=True)
class Job:
    """One run of ``ackd fit``.

    Attributes:
        title: for the screen.
        pair: name of the pair; of a teacher that several pairs share, the first of them.
        row: name of the row; empty for teachers and assistants.
        kind: ``student``, ``teacher``, ``early_stopped`` or ``assistant``.
        seed: of the run.
        arguments: behind ``ackd fit``.
        folder: of the run.
        needs: folders of the runs whose networks it learns from.
        settings: dotted settings that make the experiment, the seed left out.
        planned: the run as it was read, without its networks.
        networks: what is known of them.
        source: the weight file that it learns from; None without a teacher.
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
    planned: PlannedRun
    networks: Networks
    source: Path | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return (self.folder / "summary.json").is_file()

    @property
    def checkpoint(self) -> Path | None:
        """A checkpoint of an interrupted run; `--resume` chooses which."""
        found = list(self.folder.glob("checkpoints/*.ckpt"))
        return found[0] if found and not self.finished else None

    @property
    def student_file(self) -> Path:
        """The trained network."""
        return self.folder / "student.safetensors"

    @property
    def epochs(self) -> int:
        """Length of the run."""
        return int(self.settings.get("trainer.max_epochs") or 0)

    @property
    def config_hash(self) -> str:
        """Short name of the settings: equal for runs that differ in their seed alone."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def state(self) -> str:
        """``finished``, ``to continue`` or ``to do``."""
        return "finished" if self.finished else "to continue" if self.checkpoint else "to do"


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Dotted settings as a command line.

    Args:
        settings: name to value.

    Example:
        >>> as_arguments({"trainer.max_epochs": 3, "model.milestones": [1, 2], "model.student": "resnet8"})
        ['--trainer.max_epochs', '3', '--model.milestones', '[1, 2]', '--model.student', 'resnet8']
    """
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


def _changed(job: Job) -> tuple[str, str, str] | None:
    """The first setting in which a run that is there differs from the plan, its value there, and the planned one.

    Settings that only one side knows (another version's) are not compared.
    """
    path = job.folder / "config.yaml"
    if not path.is_file() or job.state() == "to do":
        return None
    there = experiment_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
    common = sorted(there.keys() & job.settings.keys())
    changed = next((key for key in common if there[key] != job.settings[key]), None)
    if changed is not None:
        return changed, json.dumps(there[changed]), json.dumps(job.settings[changed])
    return _changed_teacher(job)


def _changed_teacher(job: Job) -> tuple[str, str, str] | None:
    """The same of the network that a finished run learnt from."""
    if job.source is None or not job.finished:
        return None
    known = read_summary(job.folder).get("teacher", {}).get("sha256")
    if known is None:
        return None
    if not job.source.is_file():
        return "a teacher", f"{known[:12]}", f"{job.source}, which is not there"
    now = digest(job.source)
    return None if now == known else ("a teacher", known[:12], f"{job.source} ({now[:12]})")


def unchanged(job: Job) -> bool:
    """Whether a run that is there was made with the planned settings.

    Args:
        job: planned.
    """
    return _changed(job) is None


def check_unchanged(job: Job) -> None:
    """Refuse to mix a run that is there with other settings.

    Args:
        job: planned.

    Raises:
        ACKDError: naming the setting that differs.
    """
    if (change := _changed(job)) is not None:
        key, there, planned = change
        raise ACKDError(
            f"run {job.folder} was made with {key} = {there} and would now have {planned}; "
            "choose another --out, or remove that run"
        )


def needs_teacher(row: Row) -> bool:
    """Whether a row's method has a teacher.

    Args:
        row: of a table.
    """
    return from_description(load_configs([row.method])[0]["model"]["init_args"]["method"]).needs_teacher


class Planner:
    """Makes the list of runs; teachers and assistants appear once however many rows need them.

    Args:
        table: to be filled.
        out: folder of the runs.
        overrides: command-line settings for every run.
    """

    def __init__(self, table: TableSpec, out: Path, overrides: Sequence[str]) -> None:
        self.table, self.out, self.overrides = table, out, list(overrides)
        self.jobs: dict[Path, Job] = {}
        self._sources: dict[tuple[str, str], Job] = {}

    def _job(
        self,
        *,
        title: str,
        pair: Pair,
        kind: str,
        configs: Sequence[str],
        settings: Mapping[str, Any],
        name: str = "",
        row: str = "",
        seeds: Sequence[int] = (_TEACHER_SEED,),
        needs: tuple[Path, ...] = (),
        learns_from: str = "",
        source: Path | None = None,
    ) -> list[Job]:
        """Plan a run for every seed; read once."""
        jobs: list[Job] = []
        fixed = [part for config in configs for part in ("--config", config)]
        fixed += ["--runs_dir", str(self.out / "runs"), "--publish", "null"]
        fixed += [*as_arguments({**self.table.settings, **settings}), *self.overrides]
        names = [f"{name}-seed{seed}" if name else f"seed{seed}" for seed in seeds]
        planned = plan_fit([*fixed, "--seed_everything", str(seeds[0]), "--name", names[0]])
        networks = Networks.of(planned.model)
        planned.forget_networks()
        experiment = {**experiment_settings(planned.settings()), "learns from": learns_from}
        for seed, run_name in zip(seeds, names, strict=True):
            own = [*fixed, "--seed_everything", str(seed), "--name", run_name]
            folder = planned.folder.with_name(run_name)
            there = self.jobs.get(folder)
            if there and (there.settings != experiment or (kind == "student" and there.pair != pair.name)):
                raise ACKDError(
                    f"{there.title} and {title} of {self.table.name} would be one run, {folder}; give both pairs the "
                    "same `early_stop`, or configurations with names of their own"
                )
            if there is None:
                self.jobs[folder] = Job(
                    title=f"{title}, seed {seed}" if kind == "student" else title,
                    pair=pair.name,
                    row=row,
                    kind=kind,
                    seed=seed,
                    arguments=tuple(own),
                    folder=folder,
                    needs=needs,
                    source=source,
                    settings=experiment,
                    planned=planned,
                    networks=networks,
                )
            jobs.append(self.jobs[folder])
        return jobs

    def _pair_settings(self, pair: Pair) -> dict[str, Any]:
        model = load_configs([str(pair.config)])[0].get("model", {})
        arguments: dict[str, Any] = model.get("init_args", {})
        for key in ("teacher", "student"):
            if not isinstance(arguments.get(key), str):
                raise ACKDError(f"{pair.config} names no {key}; a pair's configuration needs one")
        return arguments

    def _teacher_config(self, pair: Pair) -> Path:
        """The configuration that trains a pair's teacher: it has the name of the weight file."""
        weights = self._pair_settings(pair).get("teacher_weights")
        if not weights:
            raise ACKDError(f"{pair.config} names no teacher_weights; name the file that the teacher's training writes")
        beside = pair.config.with_name(f"{Path(weights).stem}.yaml")
        return beside if beside.is_file() else find_config(Path(weights).stem)

    def given_weights(self, pair: Pair) -> Path | None:
        """The teacher's weight file that a pair names, when it is there already.

        Args:
            pair: whose configuration names it.
        """
        weights = self._pair_settings(pair).get("teacher_weights")
        path = Path(str(weights))
        return path if weights and path.is_file() else None

    def teacher(self, pair: Pair, *, early: bool = False) -> Job:
        """The run that trains a pair's teacher, the early-stopped one if asked for.

        The early-stopped teacher is trained for the given share of the schedule from the start, its milestones moved
        in proportion (specification A50): 65 of 200 epochs turn milestones 100, 150 into 32, 48.

        Args:
            pair: whose teacher.
            early: stop early.
        """
        key = (pair.name, "early_stopped" if early else "teacher")
        if key not in self._sources:
            self._sources[key] = self._plan_teacher(pair, early=early)
        return self._sources[key]

    def known_teacher(self, pair: Pair) -> Job | None:
        """The run that trains a pair's teacher, when one is planned.

        Args:
            pair: whose teacher.
        """
        return self._sources.get((pair.name, "teacher"))

    def teacher_file(self, pair: Pair) -> tuple[str, str]:
        """Model name and weight file of a pair's teacher.

        Args:
            pair: whose teacher.
        """
        given = self.given_weights(pair)
        return self._pair_settings(pair)["teacher"], str(given or self.teacher(pair).student_file)

    def _plan_teacher(self, pair: Pair, *, early: bool) -> Job:
        config = self._teacher_config(pair)
        label = f"teacher {self._pair_settings(pair)['teacher']}"
        settings = dict(self.table.teacher_settings)
        if not early:
            return self._job(title=label, pair=pair, kind="teacher", configs=[str(config)], settings=settings)[0]
        whole = load_configs([str(config)])[0]["trainer"]["max_epochs"]
        if not pair.early_stop:
            raise ACKDError(f"pair {pair.name} of {self.table.name} has no `early_stop`, which ESKD needs")
        resolved = self.teacher(pair, early=False) if self.given_weights(pair) is None else None
        planned = resolved.settings if resolved else experiment_settings(self._read(config, settings).settings())
        epochs = max(1, round(planned["trainer.max_epochs"] * pair.early_stop / whole))
        scale = epochs / planned["trainer.max_epochs"]
        shorter = {
            "trainer.max_epochs": epochs,
            "model.milestones": [max(1, int(each * scale)) for each in planned["model.milestones"]],
        }
        overrides, self.overrides = self.overrides, [*self.overrides, *as_arguments(shorter)]
        try:
            title = f"{label}, stopped after {epochs} epochs"
            found = self._job(
                title=title, pair=pair, kind="early_stopped", configs=[str(config)], settings=settings, name="early"
            )
        finally:
            self.overrides = overrides
        return found[0]

    def _read(self, config: Path, settings: Mapping[str, Any]) -> PlannedRun:
        values = as_arguments({**self.table.settings, **settings})
        return plan_fit(["--config", str(config), *values, *self.overrides, "--name", "unnamed"])

    def assistant(self, pair: Pair) -> Job:
        """The run that trains TAKD's assistant with KD from the teacher (specification A51).

        Args:
            pair: which names the assistant.
        """
        if (pair.name, "assistant") in self._sources:
            return self._sources[pair.name, "assistant"]
        if not pair.assistant:
            raise ACKDError(f"pair {pair.name} of {self.table.name} has no `assistant`, which TAKD needs")
        source, needs = self._source(pair, "teacher")
        settings = {**self.table.student_settings, **source, "model.student": pair.assistant}
        self._sources[pair.name, "assistant"] = self._job(
            title=f"assistant {pair.assistant}",
            pair=pair,
            kind="assistant",
            configs=[str(pair.config), "kd"],
            settings=settings,
            name=f"assistant-{pair.assistant}",
            needs=needs,
            source=Path(source["model.teacher_weights"]),
        )[0]
        return self._sources[pair.name, "assistant"]

    def _source(self, pair: Pair, kind: TeacherKind) -> tuple[dict[str, Any], tuple[Path, ...]]:
        """Settings that name the network to learn from, and the runs that train it."""
        given = self.given_weights(pair)
        if kind == "teacher" and given is not None:
            return {"model.teacher_weights": str(given)}, ()
        if kind == "assistant":
            job = self.assistant(pair)
            weights = {"model.teacher": pair.assistant, "model.teacher_weights": str(job.student_file)}
            return weights, (job.folder,)
        job = self.teacher(pair, early=kind == "early_stopped")
        return {"model.teacher_weights": str(job.student_file)}, (job.folder,)

    def add(self, pair: Pair, row: Row, seeds: Sequence[int]) -> list[Job]:
        """Plan a row of a pair, and what it needs.

        Args:
            pair: networks and data.
            row: method.
            seeds: one run each.
        """
        if row.teacher == "itself":
            return [job for seed in seeds for job in self._add(pair, row, [seed], *self._itself(pair, seed))]
        return self._add(pair, row, seeds, *(self._source(pair, row.teacher) if needs_teacher(row) else ({}, ())))

    def _itself(self, pair: Pair, seed: int) -> tuple[dict[str, Any], tuple[Path, ...]]:
        """The student trained alone from the same seed, as a teacher; shared with the row ``ce``."""
        (job,) = self.add(pair, self.table.rows.get("ce", Row("ce", "ce", label="ce")), [seed])
        student = self._pair_settings(pair)["student"]
        return {"model.teacher": student, "model.teacher_weights": str(job.student_file)}, (job.folder,)

    def _add(
        self, pair: Pair, row: Row, seeds: Sequence[int], source: Mapping[str, Any], needs: tuple[Path, ...]
    ) -> list[Job]:
        return self._job(
            title=f"{pair.name}: {row.label}",
            pair=pair,
            row=row.name,
            kind="student",
            configs=[str(pair.config), row.method],
            settings={**self.table.student_settings, **source, **row.settings},
            name=row.name,
            seeds=seeds,
            needs=needs,
            learns_from=row.teacher if source else "",
            source=Path(source["model.teacher_weights"]) if source else None,
        )
