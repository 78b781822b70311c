"""``ackd tune``: choose settings by the validation accuracy of short runs."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.table import Table

from ackd_lightning.callbacks.metrics_csv import drop_partial_line
from ackd_lightning.commands.processes import Processes, devices_for, resumable, say
from ackd_lightning.commands.reproduce.jobs import as_arguments
from ackd_lightning.commands.tune.space import Values, fragment, grid, read_values
from ackd_lightning.config.experiment import experiment_settings
from ackd_lightning.errors import ACKDError, RunsFailedError
from ackd_lightning.extras import require
from ackd_lightning.launch.execute import in_our_words
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.models.weights import digest
from ackd_lightning.runs.claim import claim
from ackd_lightning.runs.console import show_table
from ackd_lightning.runs.files import measured_last, read_summary
from ackd_lightning.writing import write_whole

_OURS = {
    "runs_dir": "use --out",
    "test": "no setting may be chosen by the test set",
    "data.train_fraction": "use --train_fraction",
    "trainer.max_epochs": "use --epochs",
}
_OURS |= dict.fromkeys(("name", "ckpt_path", "resume", "weights_dir"), "leave it out")
_METRIC = "val/acc"
_SCHEDULE = "model.lr_scheduler"
_MILESTONES = f"{_SCHEDULE}.milestones"
_SAME_RESULT = frozenset({"data.url", "data.download", "data.cache", "model.teacher.cache"})
"""Settings of places that change no result."""


def tune(
    *,
    space: Sequence[str],
    trials: int = 20,
    train_fraction: float | None = None,
    epochs: int | None = None,
    out: str = "tune",
    seed: int = 0,
    workers: int | None = None,
    settings: Sequence[str] = (),
) -> None:
    """Search, print a table, and write the best settings as a configuration.

    Args:
        space: Settings and their values, each as ``NAME=VALUES``.
        trials: Number of runs, those of earlier calls with the same ``out`` included.
        train_fraction: Share of the training images of every trial; None for that of the settings.
        epochs: Length of every trial; None for that of the settings. Milestones and warm-up are shortened with it.
        out: Folder of runs, logs, the study of Optuna and the best settings.
        seed: Seed of the search.
        workers: Number of concurrent runs; None: one per GPU.
        settings: Settings of ``ackd fit`` that all trials share.

    Raises:
        ACKDError: If the input is wrong, before any training.
        RunsFailedError: If the first trial, or every one, fails.
    """
    optuna = require("optuna", "tune", "`ackd tune`")
    if trials < 1:
        raise ACKDError(f"--trials is {trials}; use 1 or more")
    values = dict(map(read_values, space))
    if len(values) < len(space):
        raise ACKDError("--set names a setting twice; give all its values in one --set")
    devices, place = devices_for(workers), Path(out)
    shared, described, own = _plan(settings, values, train_fraction, epochs)
    check_writable(place, "--out")
    where = place.resolve()
    with claim(where.parent, where.name, resume=True, option="--out") as mine, resumable():
        if mine.held:
            _clear_log(place)
        search = _Search(optuna, place, values, shared, described, own, seed=seed, parallel=len(devices) > 1)
        combinations = grid(values, trials)
        number = len(combinations) or trials
        if len(combinations) < trials and combinations:
            print(f"{number} trials: all combinations of the values")
        waiting = search.begin(combinations)
        search.run(len(search.finished) + waiting if combinations else number, devices)
        _report(search, settings)


def _log(place: Path) -> Path:
    """File of a search; absolute, as Optuna waits forever for the lock of a dead process at a relative one."""
    return (place / "study.log").resolve()


def _clear_log(place: Path) -> None:
    """Remove the lock and the partial line of a process that was killed; no other one may own the folder."""
    log = _log(place)
    for left in log.parent.glob(f"{log.name}.lock*"):
        left.unlink(missing_ok=True)
    if log.is_file():
        drop_partial_line(log)


def _plan(
    settings: Sequence[str], space: Mapping[str, Values], train_fraction: float | None, epochs: int | None
) -> tuple[list[str], dict[str, Any], _OwnSchedule]:
    """Check the settings; return the arguments that all trials share, what the study depends on, and a schedule."""
    for part in (*settings, *(f"--{name}" for name in space)):
        name = part.removeprefix("--").partition("=")[0]
        if part.startswith("--") and name in _OURS:
            raise ACKDError(f"--{name} does not work with `ackd tune`; {_OURS[name]}")
    given = {part.removeprefix("--").partition("=")[0] for part in settings if part.startswith("--")}
    if twice := sorted(given & space.keys()):
        raise ACKDError(f"--{twice[0]} is given and searched by --set; leave one of them out")
    with in_our_words(settings):
        base = ACKDCLI("fit", settings)
        extra: dict[str, Any] = {"weights_dir": None}  # teachers would write the same file
        if train_fraction is not None:
            extra["data.train_fraction"] = train_fraction
        own = _OwnSchedule()
        if epochs is not None:
            extra |= {"trainer.max_epochs": epochs, **_shortened(base, epochs, space)}
            if _SCHEDULE in space and (milestones := extra.pop(_MILESTONES, None)) is not None:
                own = _OwnSchedule(str(base.option(f"{_SCHEDULE}.class_path")).rpartition(".")[2], milestones)
        first = {name: each.choices[0] if each.choices else each.low for name, each in space.items()}
        arguments = [*settings, *as_arguments(extra)]
        chosen = ACKDCLI("fit", [*arguments, *as_arguments(own.beside(first))])
        if chosen.option("trainer.fast_dev_run"):
            raise ACKDError("trainer.fast_dev_run writes no accuracy to choose settings by; leave it out")
        if getattr(chosen.build_data(), "val_is_test", False) or chosen.option("trainer.limit_val_batches") == 0:
            raise ACKDError(
                "no validation data are held out (data.val_fraction is 0, or trainer.limit_val_batches), and settings "
                "must not be chosen by the test set; set --data.val_fraction 0.1"
            )
    known = {name: value for name, value in _experiment(chosen.settings()).items() if name not in space}
    return arguments, {"space": {name: each.text for name, each in space.items()}, "settings": known}, own


class _OwnSchedule(NamedTuple):
    """Shortened milestones where the class of the schedule is searched: those of the class that the settings name."""

    name: str = ""
    milestones: Sequence[int] = ()

    def beside(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a trial, with the milestones if it has that class."""
        chosen = str(given.get(_SCHEDULE, "")).rpartition(".")[2]
        return {**given, _MILESTONES: self.milestones} if chosen and chosen == self.name else {**given}


def _experiment(settings: dict[str, Any]) -> dict[str, Any]:
    """What the trials of one study have in common: settings, and the data and the teachers that they read."""
    found = experiment_settings(settings, places=True)
    found = {name: value for name, value in found.items() if name not in _SAME_RESULT}
    found["seed_everything"] = settings.get("seed_everything")
    if root := found.get("data.root"):
        found["data.root"] = str(Path(root).absolute())
    for name in {"model.teacher.weights", "model.student.weights"} & found.keys():
        found[name] = _with_digest(found[name])
    if isinstance(teachers := found.get("model.teacher"), list):
        found["model.teacher"] = [{**each, "weights": _with_digest(each.get("weights"))} for each in teachers]
    return found


def _with_digest(weights: Any) -> Any:
    """A weight file by its whole path and its content; anything else as it is."""
    is_file = isinstance(weights, str) and Path(weights).is_file()
    return f"{Path(weights).absolute()}, sha256 {digest(weights)}" if is_file else weights


def _shortened(base: ACKDCLI, epochs: int, space: Mapping[str, Values]) -> dict[str, Any]:
    """Milestones, warm-up and the epochs in which a method starts, in proportion to the length, unless searched."""
    whole = base.option("trainer.max_epochs")
    if not whole or whole <= 0 or epochs >= whole:
        return {}
    found: dict[str, Any] = {}
    milestones = base.option(f"{_SCHEDULE}.init_args.milestones")
    if milestones and _MILESTONES not in space:
        found[_MILESTONES] = [max(1, round(each * epochs / whole)) for each in milestones]
    warmup = base.option("model.recipe.warmup_epochs")
    if warmup and "model.recipe.warmup_epochs" not in space:
        found["model.recipe.warmup_epochs"] = round(warmup * epochs / whole)
    method = {} if "model.method" in space else base.settings()["model"]["method"]
    for name, value in _lengths("model.method", method):
        if name not in space:
            found[name] = max(1, round(value * epochs / whole))
    if found:
        texts = ", ".join(f"{name.removeprefix('model.')} {value}" for name, value in found.items())
        print(f"shortened from {whole} to {epochs} epochs with the schedule: {texts}")
    return found


def _lengths(name: str, value: Any) -> Iterator[tuple[str, int]]:
    """Yield the lengths in epochs among the arguments of a method, and of the methods in a sum, by setting."""
    if name.endswith("_epochs") and isinstance(value, int) and value:
        yield name, value
    if isinstance(value, dict):
        for inner, each in value.items():
            yield from _lengths(name if inner == "init_args" else f"{name}.{inner}", each)
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from _lengths(f"{name}.{number}", each)


class _Search:
    """A study of Optuna in a file, and the runs of its trials.

    Args:
        optuna: The library.
        place: Folder.
        space: Values by setting.
        shared: Arguments of ``ackd fit`` of all trials.
        described: What the study depends on; another call must have the same.
        own: Milestones of trials with one class of schedule.
        seed: Seed of the search.
        parallel: Whether several trials run at a time.
    """

    def __init__(
        self,
        optuna: Any,
        place: Path,
        space: Mapping[str, Values],
        shared: Sequence[str],
        described: dict[str, Any],
        own: _OwnSchedule,
        *,
        seed: int,
        parallel: bool,
    ) -> None:
        self.optuna, self.place, self.space, self.shared, self.own = optuna, place, space, shared, own
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = require("optuna.storages.journal", "tune", "`ackd tune`")
        place.mkdir(parents=True, exist_ok=True)
        log = _log(place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(log)))
            self.study = optuna.create_study(
                storage=storage, study_name="ackd", direction="maximize", load_if_exists=True
            )
            # trials of earlier calls move the seed, so that these do not repeat their first draws
            start = seed + len(self.study.get_trials(deepcopy=False))
            self.study.sampler = optuna.samplers.TPESampler(seed=start, constant_liar=parallel)
        self._same(described)

    def _same(self, described: dict[str, Any]) -> None:
        """Refuse a folder of another search."""
        before = self.study.user_attrs.get("described")
        if before is None:
            self.study.set_user_attr("described", described)
            return
        for part in ("space", "settings"):
            for name in sorted(before[part].keys() | described[part].keys()):
                there, here = (json.dumps(each[part].get(name)) for each in (before, described))
                if there != here:
                    raise ACKDError(
                        f"{self.place} holds a search with {name} = {there} and this one has {here}; "
                        "choose another --out, or remove that folder"
                    )

    def begin(self, combinations: Sequence[dict[str, str]]) -> int:
        """Plan what an earlier call has left unfinished, and every combination of a grid that has no accuracy yet.

        Args:
            combinations: Parameters of a grid; empty for a search.

        Returns:
            Number of trials that are planned.
        """
        states = self.optuna.trial.TrialState
        for left in self.study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            self.study.tell(left.number, state=states.FAIL)
            self.study.enqueue_trial(left.params)
        kept = self.study.get_trials(deepcopy=False, states=(states.COMPLETE, states.WAITING))
        known = [each.params or each.system_attrs.get("fixed_params") for each in kept]
        for each in combinations:
            if each not in known:
                self.study.enqueue_trial(each)
        return len(self.study.get_trials(deepcopy=False, states=(states.WAITING,)))

    @property
    def finished(self) -> list[Any]:
        """Trials with an accuracy, the best first."""
        trials = self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.COMPLETE,))
        return sorted(trials, key=lambda each: (-each.value, each.number))

    def run(self, number: int, devices: Sequence[str | None]) -> None:
        """Run trials until enough have finished.

        Args:
            number: Number of finished trials.
            devices: Devices as of `Processes`.

        Raises:
            RunsFailedError: If a trial fails and none has succeeded.
        """
        processes = Processes(devices)
        running: dict[Future[str | None], Any] = {}
        failed = 0
        with ThreadPoolExecutor(max_workers=len(devices)) as pool:
            try:
                while len(self.finished) + len(running) + failed < number or running:
                    while len(running) < len(devices) and len(self.finished) + len(running) + failed < number:
                        trial = self.study.ask()
                        given = {name: each.suggest(trial, name) for name, each in self.space.items()}
                        trial.set_user_attr("settings", given)
                        running[pool.submit(self._fit, processes, trial.number, given)] = trial
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        failed += self._tell(running.pop(done), done)
            except BaseException:
                processes.stop()
                raise

    def folder(self, number: int) -> Path:
        """Return the folder of a trial's run.

        Args:
            number: Number of the trial.
        """
        found = list((self.place / "runs").glob(f"*/trial{number:04}"))
        return found[0] if found else self.place / "runs"

    def _fit(self, processes: Processes, number: int, given: Mapping[str, Any]) -> str | None:
        device = processes.devices.get()
        try:
            log = self.place / "logs" / f"trial{number:04}.log"
            log.parent.mkdir(exist_ok=True)
            texts = ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in given.items())
            label = f"trial {number}: {texts}"
            say(f"{label}: starts")
            place = ["--runs_dir", str(self.place / "runs"), "--name", f"trial{number:04}"]
            chosen = as_arguments(self.own.beside(given))
            reason = processes.process(["fit", *self.shared, *chosen, *place], log, device, label)
            return f"{reason} (output in {log})" if reason else None
        finally:
            processes.devices.put(device)

    def _tell(self, trial: Any, done: Future[str | None]) -> int:
        """Tell Optuna the accuracy of a run; return 1 for a failure."""
        reason, value = done.result(), None
        if reason is None:
            value = measured_last(read_summary(self.folder(trial.number))).get(_METRIC)
            reason = None if value is not None else "its last epoch had no validation"
        if reason is not None:
            self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            say(f"trial {trial.number} failed: {reason}")
            if not self.finished:
                raise RunsFailedError(f"trial {trial.number} failed and none has succeeded: {reason}")
            return 1
        self.study.tell(trial, value)
        best = self.finished[0]
        say(f"trial {trial.number}: val acc {value:.2%} (best {best.value:.2%}, trial {best.number})")
        return 0


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _report(search: _Search, settings: Sequence[str]) -> None:
    """Print the table and the best settings, and write them."""
    names = list(search.space)
    table = Table(title=f"validation accuracy in %, last epoch ({len(search.finished)} trials)")
    for column in ("trial", *names, "val acc", "seconds", "run"):
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for trial in search.finished:
        run, given = search.folder(trial.number), trial.user_attrs["settings"]
        seconds = read_summary(run)["seconds"] if (run / "summary.json").is_file() else 0.0
        cells = [_short(given[name]) for name in names]
        table.add_row(str(trial.number), *cells, f"{100 * trial.value:.2f}", f"{seconds:.0f}", str(run))
    show_table(table)
    best = search.finished[0]
    run = search.folder(best.number)
    # as options: another one may name the class whose argument it is
    chosen = as_arguments(best.user_attrs["settings"])
    whole = ACKDCLI("fit", [*settings, *chosen]).settings()  # those of the run are shortened
    text = yaml.safe_dump(fragment(whole, names), sort_keys=False)
    head = f"# best of {len(search.finished)} trials of ackd tune: validation accuracy {best.value:.2%} in {run}\n"
    path = search.place / "best.yaml"
    write_whole(head + text, path)
    print(f"{path}:\n{text}", end="")
    print(f"next:\n  {shlex.join(['ackd', 'fit', *settings, *chosen])}")
