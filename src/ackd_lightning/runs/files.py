"""Files of a run: find them, read checkpoints and summaries."""

from __future__ import annotations

import contextlib
import filecmp
import itertools
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError, count_of, first_line, near_matches
from ackd_lightning.models.metadata import LARGEST_INPUT
from ackd_lightning.writing import write_whole

Which = Literal["last", "best"]
CURVES, LEARNERS = "curves.png", "learners.png"
"""Figures of a run."""
STARTED, RUN = "# started in ", "# folder of the run: "
"""Beginnings of the first two lines of ``config.yaml``, which name folders."""
STUDENT = "student.safetensors"
"""Student of a run, as its last epoch left it."""
_MAX_CLASSES = 1_000_000
_REQUIRED = {"num_classes", "input_size", "mean", "std", "data", "method", "seed", "epoch"}
"""Metadata that every checkpoint has under ``ackd_lightning``."""


def same_content(first: Path, second: Path) -> bool:
    """Return whether two files exist and have the same bytes.

    Args:
        first: File.
        second: Another file.
    """
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file whole or not at all.

    Args:
        content: Plain data.
        path: File to write.
    """
    text = json.dumps(content, indent=1)
    write_whole(text, path)


def started_in(config: Path) -> Path | None:
    """Return the folder in which a run was started; None where it is not known or gone.

    Args:
        config: ``config.yaml`` of the run.
    """
    return _noted(config, STARTED)


def copied_from(folder: Path) -> Path | None:
    """Return the run of which a folder is a copy; None for a run in its own place, and for one that was moved.

    Args:
        folder: Folder of a run.
    """
    original = _noted(folder / "config.yaml", RUN)
    return None if original is None or original.samefile(folder) else original


def _noted(config: Path, begin: str) -> Path | None:
    """Folder that a comment at the head of a ``config.yaml`` names, if it is there."""
    lines: list[str] = []
    with contextlib.suppress(OSError, UnicodeDecodeError), config.open(encoding="utf-8") as head:
        lines = list(itertools.islice(head, 2))
    noted = next((Path(line.removeprefix(begin).strip()) for line in lines if line.startswith(begin)), None)
    return noted if noted is not None and noted.is_dir() else None


def find_checkpoint(run: str | Path, which: Which = "last") -> Path:
    """Return the checkpoint file that a run folder or a file name stands for.

    Args:
        run: Folder of a run, or a checkpoint file.
        which: Checkpoint to take from a folder.

    Raises:
        ACKDError: If the folder has no such checkpoint, ``run`` does not exist, or it is another checkpoint.
    """
    path = Path(run)
    if path.is_dir():
        found = path / "checkpoints" / f"{which}.ckpt"
        if not found.is_file():
            raise _no_checkpoint(path, found)
        return found
    if not path.is_file():
        beside = [each.name for each in path.parent.glob("*/") if (each / "checkpoints").is_dir()]
        hint = near_matches(path.name, beside, otherwise="`ackd fit` writes runs to runs/CONFIG/NAME")
        raise ACKDError(f"{run} is neither a run folder nor a checkpoint; {hint}")
    if path.suffix != ".ckpt" and (path.parent / "checkpoints").is_dir():
        raise ACKDError(f"{path} is a file of a run and no checkpoint; name the run {_named(path.parent)}")
    refuse_which(path, which)
    return path


def refuse_which(path: Path, which: Which) -> None:
    """Refuse a choice of checkpoint where a file is named, which is or has one checkpoint.

    Args:
        path: File.
        which: Checkpoint that was chosen; ``last`` is the default.

    Raises:
        ACKDError: If the file is not that checkpoint.
    """
    if which != "last" and path.stem != which:
        raise ACKDError(f"--which is {which} and {path} is a file and not a run; name the run, or leave --which out")


def _no_checkpoint(folder: Path, wanted: Path) -> ACKDError:
    """Say what a folder is that has no such checkpoint, and what to name instead."""
    if others := sorted(each.name for each in folder.glob("checkpoints/*.ckpt")):
        return ACKDError(
            f"{wanted} does not exist (its checkpoints: {', '.join(others)}); choose another run or --which"
        )
    if _named(folder).name == "checkpoints":
        return ACKDError(
            f"{folder} is the folder of a run's checkpoints; name the run {run_folder(folder / 'last.ckpt')}"
        )
    below = (each for deep in ("*", "*/*") for each in folder.glob(f"{deep}/checkpoints/*.ckpt"))
    if runs := sorted({str(run_folder(each)) for each in below}):
        more = f" and {count_of(len(runs) - 3, 'other')}" if len(runs) > 3 else ""
        return ACKDError(f"{folder} is no run and has the runs {', '.join(runs[:3])}{more}; name one of them")
    return ACKDError(f"{wanted} does not exist and {folder} has no other checkpoint; choose another run")


def _named(path: Path) -> Path:
    """Return a path that ends in a name, unlike ``.`` and ``..``, which have none."""
    return path if path.name not in ("", "..") else path.resolve()


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to.

    Args:
        checkpoint: Checkpoint file.
    """
    folder = _named(checkpoint.parent)
    return _named(folder.parent) if folder.name == "checkpoints" else folder


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this package onto the CPU; tensors and plain data only.

    Args:
        path: Checkpoint file.

    Raises:
        ACKDError: If it is truncated, damaged, or was not written by this package.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can fail in any way
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # whose text explains an option of torch
            reason = "it has more than tensors and plain data, or is no checkpoint"
        raise ACKDError(f"{path} cannot be read as a checkpoint ({reason}); choose another one") from error
    if not isinstance(checkpoint, dict) or "ackd_lightning" not in checkpoint or "state_dict" not in checkpoint:
        raise ACKDError(
            f"{path} is not a checkpoint of ackd-lightning; name a run folder or a .ckpt that `ackd fit` wrote"
        )
    if (problem := _damage(checkpoint)) is not None:
        raise ACKDError(f"{path} is damaged ({problem}); choose another one")
    return checkpoint


def _damage(checkpoint: Mapping[str, Any]) -> str | None:
    """Describe what is wrong with the parts of a checkpoint that this package reads; None when nothing is."""
    state, metadata, hparams = (checkpoint.get(key, {}) for key in ("state_dict", "ackd_lightning", "hyper_parameters"))
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return "its state_dict has no names"
    if not all(isinstance(value, Tensor) for value in state.values()):
        return "its state_dict has entries that are not tensors"
    if not isinstance(metadata, Mapping) or not isinstance(hparams, Mapping):
        return "its settings are not mappings"
    if missing := _REQUIRED - set(metadata):
        return f"it lacks {', '.join(sorted(missing))}"
    sides = metadata["input_size"] if isinstance(metadata["input_size"], (list, tuple)) else [metadata["input_size"]]
    numbers = [("num_classes", metadata["num_classes"], _MAX_CLASSES)]
    numbers += [("input_size", side, LARGEST_INPUT) for side in sides]
    for key, value, largest in numbers:
        if not isinstance(value, int) or not 1 <= value <= largest or len(sides) not in (1, 2):
            return f"its {key} is {str(metadata[key])[:40]}"
    kinds: tuple[tuple[Mapping[str, Any], str, type | tuple[type, ...]], ...] = (
        (metadata, "model", str),
        (metadata, "model_options", dict),
        (metadata, "head", dict),
        (metadata, "learners", list),
        (metadata, "class_names", (list, tuple)),
    )
    for place, key, kind in kinds:
        if place.get(key) and not isinstance(place[key], kind):
            return f"its {key} is {str(place[key])[:40]}"
    for key in ("learners", "class_names"):
        if not all(isinstance(each, str) for each in metadata.get(key) or []):
            return f"its {key} has an entry that is not text"
    names = metadata.get("class_names") or []
    if names and len(names) != metadata["num_classes"]:
        return f"it has {len(names)} class names and {metadata['num_classes']} classes"
    return None


def measured_last(summary: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a run's last weights; nothing where the last validation came before the last step.

    Args:
        summary: Content of ``summary.json``.
    """
    last: dict[str, float] = summary["last"]
    return last if summary.get("measured_at", summary.get("steps")) == summary.get("steps") else {}


def read_summary(run: Path) -> dict[str, Any]:
    """Read the summary of a finished run.

    Args:
        run: Folder of the run.

    Raises:
        ACKDError: If there is none, or it cannot be read.
    """
    path = run / "summary.json"
    if not path.is_file():
        raise ACKDError(f"{run} has no finished run (no summary.json); name a folder that `ackd fit` wrote")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = first_line(error, 300)
        raise ACKDError(f"{path} cannot be read ({reason}); restore it, or remove the run's folder") from error
    kinds = {"config": str, "seed": int, "shown": str, "last": dict, "best": dict}
    wrong = [
        key for key, kind in kinds.items() if not isinstance(summary, dict) or not isinstance(summary.get(key), kind)
    ]
    if wrong:
        raise ACKDError(
            f"{path} is not the summary of a run ({wrong[0]} is missing); restore it, or remove the run's folder"
        )
    return dict(summary)


def _with_summary(place: Path) -> Iterator[Path]:
    """Yield the folders below a folder that have a summary, also those of links, each once."""
    seen: set[str] = set()
    for folder, below, files in os.walk(place, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        if "summary.json" in files:
            yield Path(folder)


def find_runs(places: Sequence[str | Path]) -> list[Path]:
    """Return the finished runs among the given folders and below them.

    Args:
        places: Folders of runs, or folders that contain them.

    Raises:
        ACKDError: If a place is not a folder, or has no finished run.
    """
    runs: dict[Path, Path] = {}  # by its absolute path
    for place in map(Path, places):
        if not place.is_dir():
            raise ACKDError(f"{place} is not a folder; name run folders such as runs/CONFIG/NAME")
        below = (each.parent for each in place.rglob("summary.json"))  # before the links to them
        found = [place] if (place / "summary.json").is_file() else [*sorted(below), *sorted(_with_summary(place))]
        if not found:
            raise ACKDError(f"{place} has no finished run (no summary.json); name a folder that `ackd fit` wrote")
        for run in map(_named, found):
            runs.setdefault(run.resolve(), run)
    return list(runs.values())


def exports(folder: Path) -> dict[Path, Path]:
    """Return the files of ``ackd export`` in a run's folder by their names, each with its checkpoint.

    Args:
        folder: Folder of a run.
    """
    found: dict[Path, Path] = {}
    for checkpoint in sorted((folder / "checkpoints").glob("*.ckpt")):
        exported = sorted(folder.glob(f"student*-{checkpoint.stem}*"))
        found |= {each: checkpoint for each in exported if each.suffix != ".bin"}
    return found


def is_older(file: Path, checkpoint: Path) -> bool:
    """Whether a file was written before its checkpoint.

    Args:
        file: Exported file.
        checkpoint: Checkpoint that it is of by its name.
    """
    return file.stat().st_mtime < checkpoint.stat().st_mtime
