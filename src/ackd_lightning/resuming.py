"""``--resume``: which run goes on, and from which checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ackd_lightning.errors import ACKDError, RunFinishedError
from ackd_lightning.export import find_checkpoint, read_checkpoint, run_folder


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
    return sorted(folder.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


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


def resume_auto(place: Path, name: str | None) -> Resumed | None:
    """The newest unfinished run of a configuration.

    Args:
        place: folder of the configuration's runs.
        name: of the run when it was given: then only this one counts.

    Returns:
        None when there is nothing to go on with, so that the run starts from the beginning.

    Raises:
        RunFinishedError: when the named run, or the only runs that there are, have ended.
        ACKDError: when no checkpoint of the run can be read.
    """
    folders = [place / name] if name else [path for path in place.glob("*") if path.is_dir()]
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
    if (reason := _unreadable(checkpoint)) is None:
        return Resumed(folder, checkpoint)
    others = [path for path in _newest_first(folder) if path != checkpoint and _unreadable(path) is None]
    raise ACKDError(f"{reason}, such as --resume {others[0]}" if others else reason)
