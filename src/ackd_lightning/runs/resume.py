"""``--resume``: find the run that is resumed, and the newest checkpoint of it that can be read."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ackd_lightning.config.experiment import differences, moved_data
from ackd_lightning.config.yaml_files import read_yaml
from ackd_lightning.errors import ACKDError, RunFinishedError, count_of
from ackd_lightning.runs.files import find_checkpoint, read_checkpoint, read_summary, run_folder


@dataclass(frozen=True)
class Resumed:
    """A run that is resumed.

    Attributes:
        folder: Folder of the run.
        checkpoint: Newest checkpoint that can be read.
        content: What `read_checkpoint` returned for it, so that nobody has to read it again.
        note: Sentence for the user about checkpoints that cannot be read; empty if all can.
    """

    folder: Path
    checkpoint: Path
    content: dict[str, Any] = field(repr=False, compare=False)
    note: str = ""


@dataclass(frozen=True)
class Length:
    """How long a fit is, in epochs, steps or time.

    Attributes:
        max_epochs: ``trainer.max_epochs``.
        max_steps: ``trainer.max_steps``.
        max_time: ``trainer.max_time``, as text (days:hours:minutes:seconds), as a mapping, or as a duration.
    """

    max_epochs: int | None
    max_steps: int | None = -1
    max_time: str | Mapping[str, int] | timedelta | None = None

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> Length:
        """Return the length that the settings of a Trainer say.

        Args:
            trainer: Settings.
        """
        return cls(trainer.get("max_epochs"), trainer.get("max_steps"), trainer.get("max_time"))

    def exceeds(self, before: Length) -> bool:
        """Return whether this is longer than an earlier fit.

        Args:
            before: Length of the earlier fit.
        """
        pairs = list(zip(self._limits(), before._limits(), strict=True))
        return any(now > then for now, then in pairs) and all(now >= then for now, then in pairs)

    def leaves(self, epochs: int, steps: int) -> bool:
        """Return whether a fit ended before it was as long as this.

        Args:
            epochs: Epochs that it has trained.
            steps: Steps that it has trained.
        """
        most, last, _ = self._limits()
        return epochs < most and steps < last

    def ended_by(self, epochs: int, steps: int) -> str:
        """Return the setting that ended a fit.

        Args:
            epochs: Epochs that it has trained.
            steps: Steps that it has trained.
        """
        _, last, seconds = self._limits()
        by_time = self.leaves(epochs, steps) and not math.isinf(seconds)
        return "max_time" if by_time else "max_steps" if steps >= last else "max_epochs"

    def _limits(self) -> tuple[float, float, float]:
        given = (self.max_epochs, self.max_steps)
        epochs, steps = (math.inf if each in (None, -1) else float(each or 0) for each in given)
        if self.max_epochs is None and math.isinf(steps):
            epochs = 1000.0  # Lightning's default
        return epochs, steps, _seconds(self.max_time)


def _seconds(time: str | Mapping[str, int] | timedelta | None) -> float:
    """Return the seconds of ``trainer.max_time``; infinite without a limit."""
    if time is None:
        return math.inf
    if isinstance(time, str):
        parts = time.split(":")
        if len(parts) != 4 or not all(map(str.isdecimal, parts)):
            raise ACKDError(
                f"trainer.max_time is {time!r}; write days:hours:minutes:seconds, such as 00:01:00:00 for an hour"
            )
        time = dict(zip(("days", "hours", "minutes", "seconds"), map(int, parts), strict=True))
    return (time if isinstance(time, timedelta) else timedelta(**time)).total_seconds()


def _newest_first(folder: Path) -> list[Path]:
    """List the checkpoints of a run: the last one, then the others from new to old."""

    def age(path: Path) -> tuple[bool, int]:
        return path.name == "last.ckpt", path.stat().st_mtime_ns

    return sorted(folder.glob("checkpoints/*.ckpt"), key=age, reverse=True)


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the content of a checkpoint, or None and what is wrong with it."""
    try:
        return read_checkpoint(path), ""
    except ACKDError as error:
        return None, str(error)


def _newest_readable(folder: Path) -> Resumed:
    """Read checkpoints of a run, the newest first, until one is whole."""
    problems: list[str] = []
    for path in _newest_first(folder):
        content, problem = _read(path)
        if content is not None:
            note = f"{problems[0]}; resuming from {path.name} instead" if problems else ""
            return Resumed(folder, path, content, note)
        problems.append(problem)
    raise ACKDError(f"no checkpoint of run {folder} can be read ({problems[0]}); remove the folder and start again")


def _refuse_finished(folder: Path, length: Length | None) -> None:
    """Refuse a finished run, unless it is to be trained longer than it was."""
    path = folder / "summary.json"
    if not path.is_file():
        return
    summary = read_summary(folder)
    epochs, before = summary.get("epochs", 0), Length.of(_config(folder).get("trainer") or {})
    ended_by = before.ended_by(epochs, summary.get("steps", 0))
    more_time = length is not None and _seconds(length.max_time) > _seconds(before.max_time)
    if length is None or not length.exceeds(before) or (ended_by == "max_time" and not more_time):
        recipe = (_config(folder).get("model") or {}).get("recipe") or {}
        stopped = recipe.get("early_stopping") is not None and before.leaves(epochs, summary.get("steps", 0))
        also = " and --model.recipe.early_stopping" if stopped else ""
        untested = "" if summary.get("test") or summary.get("shown") == "test" else " and was not tested"
        measure = f", `ackd test {shlex.quote(str(folder))}` to measure it" if untested else ""
        raise RunFinishedError(
            f"run {folder} is finished ({count_of(epochs, 'epoch')}){untested}; raise --trainer.{ended_by}{also} to "
            f"train it longer, or leave --resume out for a new one{measure}"
        )


def _config(folder: Path) -> dict[str, Any]:
    """Return the settings that a run was started with; none where its ``config.yaml`` is missing."""
    path = folder / "config.yaml"
    return (read_yaml(path) or {}) if path.is_file() else {}


def _seed_of(folder: Path) -> Any:
    return _config(folder).get("seed_everything")


def resume_auto(place: Path, name: str | None, seed: Any = None, length: Length | None = None) -> Resumed | None:
    """Find the newest unfinished run of a configuration.

    Args:
        place: Folder of the configuration's runs.
        name: Name of the run, if it has one: only this run counts then.
        seed: Seed of the run: without a name, runs with another seed do not count.
        length: Length of the fit; a finished run that was shorter is trained longer.

    Returns:
        The run, or None if there is nothing to resume, so that the run starts from the beginning.

    Raises:
        RunFinishedError: If the named run, or every run that counts, is finished.
        ACKDError: If no checkpoint of the run can be read.
    """
    folders = [place / name] if name else [path for path in place.glob("*") if path.is_dir() and _seed_of(path) == seed]
    with_checkpoint = [(found[0].stat().st_mtime_ns, folder) for folder in folders if (found := _newest_first(folder))]
    unfinished = [each for each in with_checkpoint if not (each[1] / "summary.json").is_file()]
    if unfinished:
        return _newest_readable(max(unfinished)[1])
    if with_checkpoint:
        newest = max(with_checkpoint)[1]
        _refuse_finished(newest, length)
        return _newest_readable(newest)
    return None


def say_other_seeds(place: Path, seed: Any) -> None:
    """Say which unfinished runs of a configuration are not resumed because they have another seed.

    Args:
        place: Folder of the configuration's runs.
        seed: Seed of the run that starts.
    """
    runs = [each for each in sorted(place.glob("*")) if _newest_first(each) and not (each / "summary.json").is_file()]
    if others := [f"{each} ({other})" for each in runs if (other := _seed_of(each)) != seed]:
        print(f"nothing to resume with seed {seed}; unfinished with another: {', '.join(others)}", flush=True)


def resume_from(value: str, length: Length | None = None) -> Resumed:
    """Find the run that ``--resume PATH`` names.

    Args:
        value: Folder of a run, or one of its checkpoints.
        length: Length of the fit; a finished run that was shorter is trained longer.

    Raises:
        RunFinishedError: If the run of a folder is finished.
        ACKDError: If there is no such run, or its checkpoint cannot be read.
    """
    path = Path(value)
    if path.is_dir():
        if not _newest_first(path):
            find_checkpoint(path)  # raises the error that lists what the folder has
        path = run_folder(path / "checkpoints" / "last.ckpt")
        _refuse_finished(path, length)
        return _newest_readable(path)
    checkpoint = find_checkpoint(path)
    folder = run_folder(checkpoint)
    content, problem = _read(checkpoint)
    if content is None:
        whole = (each for each in _newest_first(folder) if each != checkpoint and _read(each)[0] is not None)
        other = next(whole, None)
        raise ACKDError(f"{problem}, such as --resume {other}" if other else problem)
    if checkpoint.absolute().parent.name != "checkpoints":
        raise ACKDError(f"{value} is not in a run's checkpoints/; name the run, or start a new one with --ckpt_path")
    return Resumed(folder, checkpoint, content)


def check_length(found: Resumed, length: Length) -> None:
    """Refuse a fit that is shorter than what the checkpoint has trained.

    Args:
        found: Run and checkpoint.
        length: Length of the fit.

    Raises:
        ACKDError: Naming both numbers of epochs.
    """
    progress = ((found.content.get("loops") or {}).get("fit_loop") or {}).get("epoch_progress") or {}
    done = int((progress.get("current") or {}).get("processed", 0))
    if length.max_epochs is not None and 0 <= length.max_epochs < done:
        raise ACKDError(
            f"run {found.folder} has trained {count_of(done, 'epoch')} and --trainer.max_epochs is "
            f"{length.max_epochs}; give {done} or more"
        )


def changed_settings(folder: Path, before: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """List settings that differ from those that a run was started with, as ``name before -> after``.

    Args:
        folder: Folder of the run.
        before: Settings that it was started with; empty where they are not known.
        settings: Settings that the run is resumed with.

    Raises:
        ACKDError: If the seed or an argument of the optimizer differs, so that it would be another run.
    """
    if not before:
        return []
    if before.get("seed_everything") != settings["seed_everything"]:
        raise ACKDError(
            f"run {folder} has --seed_everything {before.get('seed_everything')} and not "
            f"{settings['seed_everything']}, so it would not continue as it began; give its seed"
        )
    changes = differences(before, settings)
    for key, (first, second) in changes.items():
        if key.startswith("model.optimizer.") or key == "model.student.backbone_lr_scale":
            raise ACKDError(
                f"run {folder} has --{key} {first} and not {second}, and its optimizer goes on with the arguments in "
                "its checkpoint; leave it out, or start a new run from the weights with --model.student.weights"
            )
    if (roots := moved_data(before, settings)) is not None:
        raise ACKDError(
            f"run {folder} has --data.root {roots[0]} and not {roots[1]}, so it would not continue as it began; give "
            "its data, or leave --resume out"
        )
    return [f"{key} {first!r} -> {second!r}" for key, (first, second) in changes.items()]
