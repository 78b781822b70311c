"""``--resume``: which run goes on, and from which checkpoint."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from ackd_lightning.config.experiment import experiment_settings
from ackd_lightning.errors import ACKDError, RunFinishedError
from ackd_lightning.runs.files import find_checkpoint, read_checkpoint, run_folder


def hold(folder: Path) -> IO[str] | None:
    """Claim a run's folder for this process, until it ends or closes what is returned.

    Args:
        folder: of the run; made if it is missing.

    Returns:
        The file that is locked; None on systems without such locks.

    Raises:
        ACKDError: when another process trains this run.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / ".lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return None  # some network file systems have no locks
        raise ACKDError(
            f"run {folder} is being trained by another process; wait for it, or choose another --name"
        ) from None
    return stream


@dataclass(frozen=True)
class Resumed:
    """A run that goes on.

    Attributes:
        folder: of the run.
        checkpoint: the newest one that can be read.
        note: what a user should know; empty for nothing.
    """

    folder: Path
    checkpoint: Path
    note: str = ""


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints of a run: the last one, then others by age."""

    def age(path: Path) -> tuple[bool, int]:
        return path.name == "last.ckpt", path.stat().st_mtime_ns

    return sorted(folder.glob("checkpoints/*.ckpt"), key=age, reverse=True)


def _unreadable(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None when it can."""
    try:
        read_checkpoint(path)
    except ACKDError as error:
        return str(error)
    return None


def _readable(folder: Path) -> Resumed:
    """The newest checkpoint of a run that is whole."""
    broken: list[str] = []
    for path in _newest_first(folder):
        reason = _unreadable(path)
        if reason is None:
            note = f"{broken[0]}; going on from {path.name} instead" if broken else ""
            return Resumed(folder, path, note)
        broken.append(reason)
    raise ACKDError(f"no checkpoint of run {folder} can be read ({broken[0]}); remove the folder and start again")


def _refuse_finished(folder: Path) -> None:
    summary = folder / "summary.json"
    if summary.is_file():
        epochs = json.loads(summary.read_text(encoding="utf-8")).get("epochs")
        raise RunFinishedError(
            f"run {folder} is finished ({epochs} epochs); leave --resume out, or choose another --name, for a new one"
        )


def _seed_of(folder: Path) -> Any:
    config = folder / "config.yaml"
    return yaml.safe_load(config.read_text(encoding="utf-8")).get("seed_everything") if config.is_file() else None


def resume_auto(place: Path, name: str | None, seed: Any = None) -> Resumed | None:
    """The newest unfinished run of a configuration.

    Args:
        place: folder of the configuration's runs.
        name: of the run when it was given: then only this one counts.
        seed: of the run: without a name, runs with another seed do not count.

    Returns:
        None when there is nothing to go on with, so that the run starts from the beginning.

    Raises:
        RunFinishedError: when the named run, or the only runs that there are, have ended.
        ACKDError: when no checkpoint of the run can be read.
    """
    folders = [place / name] if name else [path for path in place.glob("*") if path.is_dir() and _seed_of(path) == seed]
    with_checkpoint = [(found[0].stat().st_mtime_ns, folder) for folder in folders if (found := _newest_first(folder))]
    unfinished = [each for each in with_checkpoint if not (each[1] / "summary.json").is_file()]
    if unfinished:
        return _readable(max(unfinished)[1])
    if with_checkpoint:
        _refuse_finished(max(with_checkpoint)[1])
    return None


def resume_from(value: str) -> Resumed:
    """The run behind ``--resume PATH``.

    Args:
        value: a run's folder, or one of its checkpoints.

    Raises:
        RunFinishedError: when a folder's run has ended.
        ACKDError: when there is none, or it cannot be read.
    """
    path = Path(value)
    if path.is_dir():
        _refuse_finished(path)
        if not _newest_first(path):
            find_checkpoint(path)  # says what is there
        return _readable(path)
    checkpoint = find_checkpoint(path)
    folder = run_folder(checkpoint)
    reason = _unreadable(checkpoint)
    if reason is None:
        if checkpoint.parent.name != "checkpoints":
            raise ACKDError(f"{value} is in no run's checkpoints/; name the run, or start a new one with --ckpt_path")
        return Resumed(folder, checkpoint)
    others = [path for path in _newest_first(folder) if path != checkpoint and _unreadable(path) is None]
    raise ACKDError(f"{reason}, such as --resume {others[0]}" if others else reason)


def changed_settings(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Settings that differ from those that a run was started with, as ``name before -> after``.

    Args:
        folder: of the run.
        settings: with which it goes on.

    Raises:
        ACKDError: when the seed differs, so that it would be another run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return []
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    if before.get("seed_everything") != settings["seed_everything"]:
        raise ACKDError(
            f"run {folder} has --seed_everything {before.get('seed_everything')} and not "
            f"{settings['seed_everything']}, so it would not go on as it began; give its seed"
        )
    there, now = experiment_settings(before), experiment_settings(settings)
    different = [key for key in sorted(there.keys() & now.keys()) if there[key] != now[key]]
    return [f"{key} {there[key]!r} -> {now[key]!r}" for key in different]
