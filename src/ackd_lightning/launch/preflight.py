"""Checks before a run starts: numbers, places to write to, processes, checkpoints."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.utilities.model_helpers import is_overridden

from ackd_lightning.config.class_paths import declared
from ackd_lightning.config.files import walk
from ackd_lightning.data.loaders import ImageLoaders
from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.launch.messages import Given
from ackd_lightning.methods.base import Method
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.models.weights import check_fit
from ackd_lightning.runs.files import read_checkpoint
from ackd_lightning.runs.tables import check_ending
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.validation import Range, check_arguments

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
    for place, value in walk(settings):
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        allowed = _RANGES.get(place, Range())
        if value not in allowed and (place, value) not in _UNLIMITED:
            words = f"a whole number from 0 to {_LARGEST_SEED}" if place == "seed_everything" else allowed
            raise ACKDError(f"setting {place} is {value}; it must be {words}")


def check_values(settings: Mapping[str, Any], classes: Mapping[str, type], given: Given) -> None:
    """Refuse arguments that this package's classes would refuse, also where nothing is built (``--print_config``).

    Args:
        settings: Parsed settings, nested.
        classes: Class by the place of its setting.
        given: Settings and their places.

    Raises:
        ACKDError: Naming the setting.
    """
    for place, cls in classes.items():
        if cls.__module__.startswith("ackd_lightning."):
            value: Any = settings
            for part in place.split("."):
                value = value[int(part)] if isinstance(value, list | tuple) else _arguments(value)[part]
            _check_value(value, cls, place, given)


def check_teachers(settings: Mapping[str, Any], given: Given) -> None:
    """Refuse settings of one of several teachers, which jsonargparse would take for another kind of value.

    Args:
        settings: Merged settings before they are parsed.
        given: Settings and their places.

    Raises:
        ACKDError: Naming the setting with the number of the teacher.
    """
    teachers = (settings.get("model") or {}).get("teacher")
    if not isinstance(teachers, list):
        return
    known = [each.name for each in fields(TeacherConfig)]
    for number, each in enumerate(teachers):
        unknown = next((str(name) for name in each if name not in known), None) if isinstance(each, Mapping) else None
        if unknown is not None and "class_path" not in each:
            name = f"model.teacher.{number}.{unknown}"
            raise ACKDError(f"there is no setting {name!r} here; {near_matches(unknown, known)}{given.at(name)}")
    _check_value(teachers, TeacherConfig, "model.teacher", given)


def _arguments(value: Any) -> dict[str, Any]:
    """The arguments of a class in settings, or of a dataclass; none for anything else."""
    found = value.get("init_args", value) if isinstance(value, Mapping) else None
    return dict(found or {})


def _check_value(value: Any, cls: type, place: str, given: Given) -> None:
    if isinstance(value, list | tuple):
        for number, each in enumerate(value):
            _check_value(each, cls, f"{place}.{number}", given)
    else:
        for name, argument in _arguments(value).items():
            for owner in cls.__mro__:
                if "__init__" not in vars(owner) or not owner.__module__.startswith("ackd_lightning."):
                    continue
                try:
                    check_arguments(owner, {name: argument}, named=cls)
                except ACKDError as error:
                    raise ACKDError(f"{error}{given.at(f'{place}.{name}') or f' ({place}.{name})'}") from None
                for inner in declared(owner, name):
                    if is_dataclass(inner):
                        _check_value(argument, inner, f"{place}.{name}", given)


def check_name(name: str) -> None:
    """Refuse a run's name that would put its folder elsewhere.

    Args:
        name: Name of the run.

    Raises:
        ACKDError: For an empty name, and one with separators.
    """
    if name.strip() in ("", ".", "..") or not name.isprintable() or any(mark in name for mark in ("/", "\\")):
        raise ACKDError(f"--name is {name!r}; it must be the name of one folder, without separators")


def check_writable(folder: Path, option: str) -> None:
    """Try to write into a folder, and leave no trace.

    Args:
        folder: Folder, which need not exist yet.
        option: Option that names the folder, for the message.

    Raises:
        ACKDError: When it cannot be made or written to.
    """
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ACKDError(
            f"{option} {folder} cannot be written ({error.strerror}); choose a folder that is writable"
        ) from error
    finally:
        for each in missing:
            with contextlib.suppress(OSError):
                each.rmdir()


def check_predictions(output: Path, *, overwrite: bool) -> None:
    """Check that ``ackd predict`` may write its file.

    Args:
        output: Value of ``--output``.
        overwrite: Value of ``--overwrite``.

    Raises:
        ACKDError: If its ending names no table, or it is a folder, exists without ``overwrite``, or cannot be written.
    """
    if output.is_dir():
        raise ACKDError(f"--output {output} exists and is a folder; choose another file")
    check_ending(output)
    if output.exists() and not overwrite:
        raise ACKDError(f"--output {output} exists; choose another file or pass --overwrite")
    check_writable(output.parent, "the folder of --output,")


def check_loaders(data: L.LightningDataModule, command: str, *, test: bool) -> None:
    """Refuse a data module that does not have the loaders that a subcommand reads.

    Args:
        data: Data module.
        command: fit, validate, test or predict.
        test: Whether a fit is followed by a test.

    Raises:
        ACKDError: Naming the method that is missing.
    """
    needed = {"fit": ["train", "val", *(["test"] if test else [])], "validate": ["val"]}.get(command, [command])
    for part in needed:
        if not is_overridden(f"{part}_dataloader", data, L.LightningDataModule):
            raise ACKDError(
                f"{type(data).__name__} has no {part}_dataloader, which `ackd {command}` reads; write it, to return a "
                "DataLoader of (image, target)"
            )


def check_processes(trainer: L.Trainer, data: Any) -> None:
    """Refuse more processes than the machine has processors, all of which Lightning would start.

    Args:
        trainer: Trainer of the run.
        data: Data module of a fit, or None. The processes must divide the global batch of one of this package; the
            batches of any other are those of each process.

    Raises:
        ACKDError: Naming the number of processors, or batch size and number of processes.
    """
    devices, most = trainer.num_devices, max(2, os.cpu_count() or 1)
    if isinstance(trainer.accelerator, CPUAccelerator) and devices > most:
        raise ACKDError(
            f"trainer.devices is {devices} and this machine has {os.cpu_count()} processors; use at most {most}"
        )
    world_size = devices * trainer.num_nodes
    if isinstance(data, ImageLoaders) and data.batch_size % world_size:
        raise ACKDError(
            f"batch_size {data.batch_size} is the global batch and cannot be divided among {world_size} processes; "
            f"use a multiple of {world_size}"
        )


def check_checkpoint(path: Path, module: DistillationModule, content: Mapping[str, Any] | None = None) -> None:
    """Compare a checkpoint with the networks that the settings build.

    Args:
        path: Checkpoint file.
        module: Training module to load it into.
        content: What `read_checkpoint` returned for it; None to read it here.

    Raises:
        ACKDError: When it cannot be read, or was made with other networks.
    """
    checkpoint = content or read_checkpoint(path)
    _compare_classes(path, checkpoint["ackd_lightning"], module)
    there, here = (_what(each) for each in (checkpoint["ackd_lightning"], module.metadata()))
    state = module.state_dict()
    empty = {key for key, each in state.items() if not each.numel()}  # memories, which only a fit creates
    methods = [(name, each) for name, each in module.named_modules() if isinstance(each, Method)]  # of a sum, too
    filled = tuple(f"{name}.{part}." for name, each in methods for part in each.fit_modules)
    own = {key: each for key, each in state.items() if key not in empty}
    stored = {
        key: each
        for key, each in checkpoint["state_dict"].items()
        if key not in empty and (key in own or not key.startswith(filled))
    }
    try:
        check_fit(stored, own, path, "the settings")
    except ACKDError:
        if there == here:
            raise
        raise ACKDError(
            f"{path} was made with {there} and the settings have {here}; leave out what differs, or start a new run"
        ) from None


def _compare_classes(path: Path, metadata: Mapping[str, Any], module: DistillationModule) -> None:
    """Refuse data with another number of classes than a checkpoint's; classes of the same number are compared later."""
    before, now = metadata.get("num_classes"), module.data.num_classes
    if before is None or before == now:
        return
    old, new = metadata.get("class_names") or (), module.data.class_names or ()
    more = [f"the data have no {each!r}" for each in old if new and each not in new][:1]
    more += [f"the checkpoint has no {each!r}" for each in new if old and each not in old][:1]
    names = f" ({', '.join(more)})" if more else ""
    raise ACKDError(f"{path} has {before} classes and the data have {now}{names}; give data of the same classes")


def _what(metadata: Mapping[str, Any]) -> str:
    """Student and method of a module's metadata, in words."""
    return f"student {metadata.get('model') or 'of your own'} and method {metadata.get('method')}"
