"""What can be known to fail before a run starts: numbers out of range, places that cannot be written, misfits."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weights import check_fit
from ackd_lightning.runs.files import read_checkpoint

_LEAST: dict[str, float] = {
    "trainer.max_epochs": 1,
    "trainer.max_steps": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 0,
    "trainer.num_nodes": 1,
    "trainer.fast_dev_run": 0,
}
"""Lightning divides by some of these, and trains nothing with others."""
_ABOVE_0 = ("trainer.limit_train_batches", "trainer.val_check_interval")
_UNLIMITED = ("trainer.max_epochs", "trainer.max_steps")  # -1 means so
_LARGEST_SEED = 2**32 - 1
_NOT_NEGATIVE = ("weight_", "lambda_")


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Refuse numbers that Lightning takes and that make no sense, and whatever is not finite.

    Args:
        settings: of one command, nested.

    Raises:
        ACKDError: naming the setting.
    """
    for place, value in _numbers(settings, ""):
        name = place.rpartition(".")[2]
        if not math.isfinite(value):
            raise ACKDError(f"setting {place} is {value}; it must be a finite number")
        if place in _LEAST and value < _LEAST[place] and not (place in _UNLIMITED and value == -1):
            raise ACKDError(f"setting {place} is {value}; use {_LEAST[place]} or more")
        if place in _ABOVE_0 and value <= 0:
            raise ACKDError(f"setting {place} is {value}; it must be above 0")
        if place.startswith("model.method.") and name.startswith(_NOT_NEGATIVE) and value < 0:
            raise ACKDError(f"setting {place} is {value}; a weight of the loss must be 0 or more")
        if place == "seed_everything" and not 0 <= value <= _LARGEST_SEED:
            raise ACKDError(f"--seed_everything is {value}; use a whole number from 0 to {_LARGEST_SEED}")


def _numbers(value: Any, place: str) -> Iterator[tuple[str, int | float]]:
    """Every number below a value, by its dotted place without ``init_args``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            below = place if key == "init_args" else f"{place}.{key}".lstrip(".")
            yield from _numbers(inner, below)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, place)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value


def check_name(name: str) -> None:
    """Refuse a run's name that would put its folder elsewhere.

    Args:
        name: of the run.

    Raises:
        ACKDError: for an empty name, and one with separators.
    """
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise ACKDError(f"--name is {name!r}; it is the name of one folder, so leave out separators and dots alone")


def check_writable(folder: Path, option: str) -> None:
    """Try to write into a folder, and leave no trace.

    Args:
        folder: there or not yet there.
        option: that names it, for the message.

    Raises:
        ACKDError: when it cannot be made or written to.
    """
    made = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ACKDError(
            f"{option} {folder} cannot be written ({error.strerror}); choose a folder that you may write in"
        ) from error
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there, the lowest first."""
    return [each for each in (folder, *folder.parents) if not os.path.lexists(each)]


def check_world(batch_size: int, world_size: int) -> None:
    """Refuse a global batch that does not divide.

    Args:
        batch_size: global.
        world_size: number of processes.

    Raises:
        ACKDError: naming both.
    """
    if batch_size % world_size:
        raise ACKDError(
            f"batch_size {batch_size} does not divide by {world_size} processes: it is the global batch, "
            f"so use a multiple of {world_size}"
        )


def check_processes(accelerator: str, devices: int) -> None:
    """Refuse more processes on a CPU than it can carry: Lightning would start every one of them.

    Args:
        accelerator: ``cpu`` or another.
        devices: as Lightning has counted them.

    Raises:
        ACKDError: naming how many there are.
    """
    most = max(2, os.cpu_count() or 1)
    if accelerator == "cpu" and devices > most:
        raise ACKDError(
            f"trainer.devices is {devices} and this machine has {os.cpu_count()} processors; use at most {most}"
        )


def check_checkpoint(path: Path, module: nn.Module, content: Mapping[str, Any] | None = None) -> None:
    """Compare a checkpoint with the networks that the settings build.

    Args:
        path: of the checkpoint.
        module: that it will be loaded into.
        content: What `read_checkpoint` returned for it; None to read it here.

    Raises:
        ACKDError: when it cannot be read, or was made with other networks.
    """
    checkpoint = content or read_checkpoint(path)
    hparams = checkpoint.get("hyper_parameters", {})
    there, here = (_what(each) for each in (hparams, getattr(module, "hparams", {})))
    problem: ACKDError | None = None
    try:
        check_fit(checkpoint["state_dict"], module.state_dict(), path, "the settings")
    except ACKDError as error:
        problem = error
    if problem is not None:  # out here, so that it does not count as the first cause
        raise (
            problem
            if there == here
            else ACKDError(f"{path} was made with {there} and the settings have {here}; choose another one")
        )


def _what(hparams: Mapping[str, Any]) -> str:
    """Student and method of a module's settings, in words."""
    method = hparams.get("method")
    path = str(method.get("class_path", "?")) if isinstance(method, Mapping) else "?"
    return f"student {hparams.get('student', '?')} and method {path.rpartition('.')[2]}"
