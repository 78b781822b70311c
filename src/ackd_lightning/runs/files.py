"""A run's folder: find it, read its checkpoints and its summary, write files whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError

Which = Literal["last", "best"]
_MOST_CLASSES, _LARGEST_INPUT = 1_000_000, 4096


_FACTS = {"num_classes", "input_size", "mean", "std", "data", "method", "seed", "epoch"}


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file that is there whole or not at all.

    Args:
        content: plain data.
        path: of the file.
    """
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)


def find_checkpoint(run: str | Path, which: Which = "last") -> Path:
    """Resolve a run folder or a checkpoint file to a checkpoint file.

    Args:
        run: either.
        which: of a run folder.

    Raises:
        ACKDError: when there is none.
    """
    path = Path(run)
    if path.is_dir():
        found = path / "checkpoints" / f"{which}.ckpt"
        if not found.is_file():
            others = ", ".join(sorted(each.name for each in path.glob("checkpoints/*.ckpt"))) or "none"
            raise ACKDError(f"{found} does not exist (checkpoints there: {others}); choose another run or --which")
        return found
    if not path.is_file():
        raise ACKDError(f"{run} is neither a run folder nor a checkpoint; `ackd fit` writes runs to runs/CONFIG/NAME")
    return path


def run_folder(checkpoint: Path) -> Path:
    """Folder of the run that a checkpoint belongs to.

    Args:
        checkpoint: a file.
    """
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint of ours; tensors and plain data only.

    Args:
        path: of a ``.ckpt`` file.

    Raises:
        ACKDError: when it is truncated or not ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ACKDError(f"{path} cannot be read as a checkpoint ({reason}); choose another one") from error
    if not isinstance(checkpoint, dict) or "ackd_lightning" not in checkpoint or "state_dict" not in checkpoint:
        raise ACKDError(
            f"{path} is no checkpoint of ackd-lightning; name a run folder or a .ckpt that `ackd fit` wrote"
        )
    if (problem := _damage(checkpoint)) is not None:
        raise ACKDError(f"{path} is damaged ({problem}); choose another one")
    return checkpoint


def _damage(checkpoint: Mapping[str, Any]) -> str | None:
    """What is wrong with the parts of a checkpoint that are read here; None for nothing."""
    state, facts, hparams = (checkpoint.get(key, {}) for key in ("state_dict", "ackd_lightning", "hyper_parameters"))
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return "its state_dict has no names"
    if not all(isinstance(value, Tensor) for value in state.values()):
        return "its state_dict holds other things than tensors"
    if not isinstance(facts, Mapping) or not isinstance(hparams, Mapping):
        return "its settings are no mappings"
    missing = _FACTS - set(facts)
    if missing:
        return f"it does not say {', '.join(sorted(missing))}"
    for key, most in (("num_classes", _MOST_CLASSES), ("input_size", _LARGEST_INPUT)):
        if not isinstance(facts[key], int) or not 1 <= facts[key] <= most:
            return f"its {key} is {str(facts[key])[:40]}"
    for place, key, kind in ((hparams, "student_options", dict), (facts, "head", dict), (facts, "learners", list)):
        if not isinstance(place.get(key) or kind(), kind):
            return f"its {key} is {str(place[key])[:40]}"
    if not all(isinstance(each, str) for each in facts.get("learners") or []):
        return "its learners have no names"
    return None


def read_summary(run: Path) -> dict[str, Any]:
    """Summary of a finished run.

    Args:
        run: its folder.

    Raises:
        ACKDError: when there is none.
    """
    path = run / "summary.json"
    if not path.is_file():
        raise ACKDError(f"{run} holds no finished run (no summary.json); name a folder that `ackd fit` wrote")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ACKDError(f"{path} cannot be read ({reason}); restore it, or remove the run's folder") from error
    kinds = {"config": str, "seed": int, "shown": str, "last": dict, "best": dict}
    wrong = [
        key for key, kind in kinds.items() if not isinstance(summary, dict) or not isinstance(summary.get(key), kind)
    ]
    if wrong:
        raise ACKDError(
            f"{path} is no summary of a run ({wrong[0]} is missing); restore it, or remove the run's folder"
        )
    return dict(summary)


def find_runs(places: Sequence[str | Path]) -> list[Path]:
    """Run folders among or directly below the given ones.

    Args:
        places: run folders, or folders of runs.

    Raises:
        ACKDError: when a place holds no finished run.
    """
    runs: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir():
            raise ACKDError(f"{place} is no folder; name run folders such as runs/CONFIG/NAME")
        found = [place] if (place / "summary.json").is_file() else sorted(p.parent for p in place.rglob("summary.json"))
        if not found:
            raise ACKDError(f"{place} holds no finished run (no summary.json); name a folder that `ackd fit` wrote")
        runs += [run for run in found if run not in runs]
    return runs
