"""Which runs a table needs, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ackd_lightning.commands.reproduce.jobs import Job, as_arguments
from ackd_lightning.commands.reproduce.networks import Networks, prove
from ackd_lightning.commands.reproduce.sources import Source, lay_into_teachers
from ackd_lightning.commands.reproduce.specs import Pair, Row, TableSpec, TeacherKind
from ackd_lightning.config.experiment import experiment_settings
from ackd_lightning.config.files import find_config, load_configs
from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.launch.execute import plan as plan_fit
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.methods.description import from_description

_MILESTONES = "model.lr_scheduler.milestones"
_TEACHER_SEED = 0
"""Seed of teachers and assistants: one of each serves the students of all seeds."""


def needs_teacher(row: Row, pair: Pair) -> bool:
    """Whether the method of a row has a teacher, with the row's settings for a pair.

    Args:
        row: Row of a table.
        pair: Pair that has the row.
    """
    described = load_configs([row.method])[0]["model"].get("method")
    if described is None:
        raise ACKDError(
            f"row {row.name} has the method {row.method}, a configuration that names none; set model.method"
        )
    changed = {"class_path": described["class_path"], "init_args": dict(described.get("init_args") or {})}
    for name, value in {**row.settings, **pair.rows.get(row.name, {})}.items():
        if name == "model.method":
            changed.update(value if isinstance(value, dict) else {"class_path": value})
        elif name.startswith("model.method."):
            changed["init_args"][name.removeprefix("model.method.").removeprefix("init_args.")] = value
    try:
        method = from_description(changed)
    except (ACKDError, TypeError):  # a short name of a class, or a mistake that the plan of the run names
        method = from_description(described)
    return method.teacher != "none"


class Planner:
    """Collects the runs of a table; teachers and assistants appear once, however many rows need them.

    Args:
        table: Table to fill.
        out: Folder of the runs.
        overrides: Settings of ``ackd fit`` for every run.
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
        sources: tuple[Path, ...] = (),
    ) -> list[Job]:
        """Plan a run per seed; the settings are parsed once."""
        jobs: list[Job] = []
        fixed = [part for config in configs for part in ("--config", config)]
        fixed += ["--runs_dir", str(self.out / "runs"), "--weights_dir", "null"]
        fixed += self._options(configs, settings)
        names = [f"{name}-seed{seed}" if name else f"seed{seed}" for seed in seeds]
        planned = plan_fit([*fixed, "--seed_everything", str(seeds[0]), "--name", names[0]], weights=False)
        prove(planned.model)
        networks, config, images = Networks.of(planned.model), planned.settings(), planned.images
        experiment = {**experiment_settings(config), "learns from": learns_from}
        for seed, run_name in zip(seeds, names, strict=True):
            own = [*fixed, "--seed_everything", str(seed), "--name", run_name]
            folder = planned.folder.with_name(run_name)
            there = self.jobs.get(folder)
            if there and (there.settings != experiment or (kind == "student" and there.pair != pair.name)):
                raise ACKDError(
                    f"{there.title} and {title} of {self.table.name} would share the run {folder}; give both pairs the "
                    "same `early_stop`, or give them configurations of different names"
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
                    sources=sources,
                    settings=experiment,
                    config=config,
                    images=images,
                    networks=networks,
                )
            jobs.append(self.jobs[folder])
        return jobs

    def _networks(self, pair: Pair) -> tuple[str, str, str | None]:
        """Model names of a pair's teacher and student, and the weight file of the teacher."""
        model: dict[str, Any] = load_configs([str(pair.config)])[0].get("model", {})
        teacher = model.get("teacher")
        student = model.get("student")
        names = {"student": student.get("network") if isinstance(student, dict) else student, "teacher.network": None}
        if isinstance(teacher, dict):
            names["teacher.network"] = teacher.get("network")
        for key, name in names.items():
            if not isinstance(name, str):
                raise ACKDError(f"{pair.config} has no model.{key}; add it, every pair needs one")
        weights = teacher.get("weights") if isinstance(teacher, dict) else None
        return str(names["teacher.network"]), str(names["student"]), weights

    def _teacher_config(self, pair: Pair) -> Path:
        """Configuration that trains the teacher of a pair: it has the name of the weight file."""
        weights = self._networks(pair)[2]
        if not weights:
            raise ACKDError(f"{pair.config} has no model.teacher.weights; name the file that the teacher's run writes")
        beside = pair.config.with_name(f"{Path(weights).stem}.yaml")
        return beside if beside.is_file() else find_config(Path(weights).stem)

    def given_weights(self, pair: Pair) -> Path | None:
        """Weight file that a pair names for its teacher; None if it does not exist.

        Args:
            pair: Pair of the table.
        """
        weights = self._networks(pair)[2]
        return Path(weights) if weights and Path(weights).is_file() else None

    def teacher(self, pair: Pair, *, early: bool = False) -> Job:
        """Plan the run that trains the teacher of a pair.

        An early-stopped teacher is trained from the start with a shorter schedule, its milestones moved in proportion:
        65 of 200 epochs turn milestones 100, 150 into 32, 48.

        Args:
            pair: Pair of the table.
            early: Whether to plan the early-stopped teacher.
        """
        key = (pair.name, "early_stopped" if early else "teacher")
        if key not in self._sources:
            self._sources[key] = self._plan_teacher(pair, early=early)
        return self._sources[key]

    def known_teacher(self, pair: Pair) -> Job | None:
        """Planned run that trains the teacher of a pair; None if there is none.

        Args:
            pair: Pair of the table.
        """
        return self._sources.get((pair.name, "teacher"))

    def teacher_file(self, pair: Pair) -> tuple[str, str]:
        """Model name and weight file of the teacher of a pair.

        Args:
            pair: Pair of the table.
        """
        given = self.given_weights(pair)
        return self._networks(pair)[0], str(given or self.teacher(pair).student_file)

    def _plan_teacher(self, pair: Pair, *, early: bool) -> Job:
        config = self._teacher_config(pair)
        label = f"teacher {self._networks(pair)[0]}"
        settings = dict(self.table.teacher_settings)
        if not early:
            return self._job(title=label, pair=pair, kind="teacher", configs=[str(config)], settings=settings)[0]
        whole = load_configs([str(config)])[0]["trainer"]["max_epochs"]
        if not pair.early_stop:
            raise ACKDError(f"pair {pair.name} of {self.table.name} has no `early_stop`, which ESKD needs")
        resolved = self.teacher(pair, early=False) if self.given_weights(pair) is None else None
        planned = resolved.settings if resolved else experiment_settings(self._read(config, settings).settings())
        if not planned.get("trainer.max_epochs"):
            raise ACKDError("trainer.max_epochs is null, and ESKD stops its teacher after a share of it; set it")
        epochs = max(1, round(planned["trainer.max_epochs"] * pair.early_stop / whole))
        shorter: dict[str, Any] = {"trainer.max_epochs": epochs}
        if milestones := planned.get(_MILESTONES):
            shorter[_MILESTONES] = [max(1, each * epochs // planned["trainer.max_epochs"]) for each in milestones]
        overrides, self.overrides = self.overrides, [*self.overrides, *as_arguments(shorter)]
        try:
            title = f"{label}, stopped after {count_of(epochs, 'epoch')}"
            found = self._job(
                title=title, pair=pair, kind="early_stopped", configs=[str(config)], settings=settings, name="early"
            )
        finally:
            self.overrides = overrides
        return found[0]

    def _read(self, config: Path, settings: Mapping[str, Any]) -> ACKDCLI:
        return plan_fit(
            ["--config", str(config), *self._options([str(config)], settings), "--name", "unnamed"], weights=False
        )

    def _options(self, configs: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        """Settings of the table and of a run, and the user's, as a command line."""
        teacher = load_configs(configs)[0].get("model", {}).get("teacher") is not None
        laid, overrides = lay_into_teachers({**self.table.settings, **settings}, self.overrides, teacher=teacher)
        return [*as_arguments(laid), *overrides]

    def assistants(self, pair: Pair) -> list[Job]:
        """Plan the runs that train the assistants of a pair, each with KD from the one before it.

        Args:
            pair: Pair of the table, which names the assistants.

        Returns:
            The runs in the order of the pair, the first of which learns from the teacher.
        """
        if not pair.assistants:
            raise ACKDError(
                f"pair {pair.name} of {self.table.name} has no `assistants`, which this row needs; add them"
            )
        chain: list[Job] = []
        for name in pair.assistants:
            if (pair.name, f"assistant {name}") not in self._sources:
                learned = self._learned(pair.assistants[len(chain) - 1], chain[-1]) if chain else self._teacher(pair)
                self._sources[pair.name, f"assistant {name}"] = self._job(
                    title=f"assistant {name}",
                    pair=pair,
                    kind="assistant",
                    configs=[str(pair.config), "kd"],
                    settings={**self.table.student_settings, **learned.settings(), "model.student": name},
                    name=f"assistant-{name}",
                    needs=learned.needs,
                    sources=learned.files,
                )[0]
            chain.append(self._sources[pair.name, f"assistant {name}"])
        return chain

    def _teacher(self, pair: Pair, *, early: bool = False) -> Source:
        given = None if early else self.given_weights(pair)
        if given is not None:
            return Source((({}, given),))
        job = self.teacher(pair, early=early)
        return Source((({}, job.student_file),), (job.folder,))

    @staticmethod
    def _learned(network: str, job: Job) -> Source:
        return Source((({"network": network}, job.student_file),), (job.folder,))

    def _source(self, pair: Pair, kind: TeacherKind) -> Source:
        """Networks to learn from."""
        if kind in ("teacher", "early_stopped"):
            return self._teacher(pair, early=kind == "early_stopped")
        chain = [self._learned(*each) for each in zip(pair.assistants, self.assistants(pair), strict=True)]
        if kind == "assistant":
            return chain[-1]
        model: dict[str, Any] = load_configs([str(pair.config)])[0]["model"]
        teacher = self._teacher(pair)
        networks = [(model["teacher"], teacher.files[0]), *(network for each in chain for network in each.networks)]
        return Source(tuple(networks), (*teacher.needs, *(need for each in chain for need in each.needs)))

    def add(self, pair: Pair, row: Row, seeds: Sequence[int]) -> list[Job]:
        """Plan the runs of a row of a pair, and the runs that they need.

        Args:
            pair: Networks and data.
            row: Method.
            seeds: Seeds, one run each.
        """
        if row.teacher == "itself":
            return [job for seed in seeds for job in self._add(pair, row, [seed], self._itself(pair, seed))]
        return self._add(pair, row, seeds, self._source(pair, row.teacher) if needs_teacher(row, pair) else Source())

    def _itself(self, pair: Pair, seed: int) -> Source:
        """Teacher that is the student trained alone from the same seed; shared with the row ``ce``."""
        (job,) = self.add(pair, self.table.rows.get("ce", Row("ce", "ce", label="ce")), [seed])
        return self._learned(self._networks(pair)[1], job)

    def _add(self, pair: Pair, row: Row, seeds: Sequence[int], source: Source) -> list[Job]:
        return self._job(
            title=f"{pair.name}: {row.label}",
            pair=pair,
            row=row.name,
            kind="student",
            configs=[str(pair.config), row.method],
            settings={
                **self.table.student_settings,
                **source.settings(),
                **row.settings,
                **pair.rows.get(row.name, {}),
            },
            name=row.name,
            seeds=seeds,
            needs=source.needs,
            learns_from=row.teacher if source.networks else "",
            sources=source.files,
        )
