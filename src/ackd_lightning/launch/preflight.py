"""Checks before a run starts: numbers, places to write to, processes, checkpoints."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weights import check_fit
from ackd_lightning.runs.files import read_checkpoint
from ackd_lightning.validation import Range

_COUNT, _FROM_0, _ABOVE_0 = Range(1), Range(0), Range(0, open_low=True)
_LARGEST_SEED = 2**32 - 1
_RANGES = {
    "seed_everything": Range(0, _LARGEST_SEED),
    "trainer.max_epochs": _COUNT,  # Lightning divides by some of these, and trains nothing with others
    "trainer.max_steps": _COUNT,
    "trainer.accumulate_grad_batches": _COUNT,
    "trainer.check_val_every_n_epoch": _COUNT,
    "trainer.num_nodes": _COUNT,
    "trainer.log_every_n_steps": _FROM_0,
    "trainer.fast_dev_run": _FROM_0,
    "trainer.limit_train_batches": _ABOVE_0,
    "trainer.val_check_interval": _ABOVE_0,
    "model.optimizer.lr": _ABOVE_0,  # torch checks these only when a fit begins, or not at all
    "model.optimizer.momentum": Range(0, 1, open_high=True),
    "model.optimizer.weight_decay": _FROM_0,
    "model.lr_scheduler.gamma": _ABOVE_0,
    "model.lr_scheduler.milestones": _FROM_0,
}
_UNLIMITED = {("trainer.max_epochs", -1), ("trainer.max_steps", -1)}


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Refuse non-finite numbers, and numbers that Lightning and torch take although no training can have them.

    Args:
        settings: Parsed settings, nested.

    Raises:
        ACKDError: Naming the setting.
    """
    for place, value in _numbers(settings, ""):
        allowed = _RANGES.get(place, Range())
        if value not in allowed and (place, value) not in _UNLIMITED:
            words = f"a whole number from 0 to {_LARGEST_SEED}" if place == "seed_everything" else allowed
            raise ACKDError(f"setting {place} is {value}; it must be {words}")


def _numbers(value: Any, place: str) -> Iterator[tuple[str, int | float]]:
    """Every number below a value with its dotted name, ``init_args`` left out."""
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
        name: Name of the run.

    Raises:
        ACKDError: For an empty name, and one with separators.
    """
    if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", "\0")):
        raise ACKDError(f"--name is {name!r}; it must be the name of one folder, without separators")


def check_writable(folder: Path, option: str) -> None:
    """Try to write into a folder, and leave no trace.

    Args:
        folder: Folder, which need not exist yet.
        option: Option that names the folder, for the message.

    Raises:
        ACKDError: When it cannot be made or written to.
    """
    made = _missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ACKDError(
            f"{option} {folder} cannot be written ({error.strerror}); choose a folder that is writable"
        ) from error
    finally:
        for each in made:
            with contextlib.suppress(OSError):
                each.rmdir()


def _missing(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist, the deepest first."""
    return [each for each in (folder, *folder.parents) if not os.path.lexists(each)]


def check_world(batch_size: int, world_size: int) -> None:
    """Refuse a global batch that does not divide.

    Args:
        batch_size: Global batch size.
        world_size: Number of processes.

    Raises:
        ACKDError: Naming both.
    """
    if batch_size % world_size:
        raise ACKDError(
            f"batch_size {batch_size} is the global batch and cannot be divided among {world_size} processes; "
            f"use a multiple of {world_size}"
        )


def check_processes(accelerator: str, devices: int) -> None:
    """Refuse more processes than the machine has processors: Lightning would start every one of them.

    Args:
        accelerator: ``cpu`` or another.
        devices: Number of processes as Lightning counts them.

    Raises:
        ACKDError: Naming the number of processors.
    """
    most = max(2, os.cpu_count() or 1)
    if accelerator == "cpu" and devices > most:
        raise ACKDError(
            f"trainer.devices is {devices} and this machine has {os.cpu_count()} processors; use at most {most}"
        )


def check_checkpoint(path: Path, module: nn.Module, content: Mapping[str, Any] | None = None) -> None:
    """Compare a checkpoint with the networks that the settings build.

    Args:
        path: Checkpoint file.
        module: Training module to load it into.
        content: What `read_checkpoint` returned for it; None to read it here.

    Raises:
        ACKDError: When it cannot be read, or was made with other networks.
    """
    checkpoint = content or read_checkpoint(path)
    hparams = checkpoint.get("hyper_parameters", {})
    there, here = (_what(each) for each in (hparams, getattr(module, "hparams", {})))
    problem: ACKDError | None = None
    try:
        state = module.state_dict()
        empty = {key for key, each in state.items() if not each.numel()}  # memories, which only a fit creates
        own = {key: each for key, each in state.items() if key not in empty}
        stored = {key: each for key, each in checkpoint["state_dict"].items() if key not in empty}
        check_fit(stored, own, path, "the settings")
    except ACKDError as error:
        problem = error
    if problem is not None:  # outside the handler, so that it does not count as the first cause
        raise (
            problem
            if there == here
            else ACKDError(f"{path} was made with {there} and the settings have {here}; choose another one")
        )


def _what(hparams: Mapping[str, Any]) -> str:
    """Student and method of a module's hyperparameters, in words."""
    method = hparams.get("method")
    path = str(method.get("class_path", "?")) if isinstance(method, Mapping) else "?"
    return f"student {hparams.get('student', '?')} and method {path.rpartition('.')[2]}"
