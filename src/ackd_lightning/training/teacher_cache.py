"""A teacher's logits for every augmented view of a training, read from disk instead of running the teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ackd_lightning.callbacks.protocol import TrainingModule
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.sampling import EpochSampler
from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.runs.files import write_json
from ackd_lightning.types import NetOutput
from ackd_lightning.writing import whole_file

KEY_FILE = "key.json"
_TOLERANCE = 0.1  # of a standard deviation
_VIEWS = 2
"""Version of the augmentation; it grows when the same seed yields other views than before (2: crops of image files)."""


def view_key(module: TrainingModule, data: ImageDataModule, precision: str) -> dict[str, Any]:
    """Return everything that a teacher's logits for the augmented views of a training depend on, as plain data.

    Args:
        module: Module whose teacher is loaded.
        data: Data module that is set up.
        precision: Lightning's name of the precision of the forward pass.

    Raises:
        ACKDError: If the method reads more of its teacher than the logits, or has no teacher, or if images are
            repeated in an epoch.
    """
    name = type(module.method).__name__
    if module.method.teacher != "logits":
        raise ACKDError(
            f"teacher.cache holds logits only and method {name} "
            f"{'has no teacher' if module.method.teacher == 'none' else 'reads more of its teacher'}; leave it out"
        )
    if data.sampling == "balanced":
        raise ACKDError(
            "teacher.cache holds one view of each image in an epoch and data.sampling is balanced, which repeats "
            "images; leave one of them out"
        )
    check_processes(data, data.trainer.world_size if data.trainer is not None else 1)
    targets = getattr(data, "train_targets", None)
    if targets is None:
        raise ACKDError(
            f"teacher.cache keeps a row for every training image and {type(data).__name__} has images without an "
            "index; leave it out"
        )
    return {
        "teachers": module.teachers.key(),
        "data": type(data).__name__,
        "images": len(targets),
        "class_names": None if data.class_names is None else list(data.class_names),
        "targets": hashlib.sha256(targets.numpy().tobytes()).hexdigest(),
        "content of the images": data.content_mark("train"),
        "input_size": list(data.input_size) if isinstance(data.input_size, tuple) else data.input_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "augment": data.augment,
        "augmentation": asdict(data.augmentation),
        "views": _VIEWS,
        "seed of the data": data.run_seed,
        "batch_size": data.batch_size,
        "precision": precision,
    }


def check_processes(data: ImageDataModule, processes: int) -> None:
    """Refuse a cache of mixed images for several processes, each of which mixes its own images with each other.

    Args:
        data: Data module.
        processes: Number of processes of the run.

    Raises:
        ACKDError: If images are mixed and there are several.
    """
    if data.augmentation.mixing() and processes > 1:
        raise ACKDError(
            f"teacher.cache keeps logits of images that one process mixes, and {processes} processes mix others: set "
            "trainer.devices to 1, or mixup and cutmix to 0"
        )


def epoch_file(folder: Path, epoch: int) -> Path:
    """Return the file with the logits of an epoch.

    Args:
        folder: Folder of the cache.
        epoch: Number of the epoch, from 0.
    """
    return folder / f"epoch-{epoch:04d}.safetensors"


def check_epoch(path: Path, *, images: int) -> None:
    """Refuse a file of an epoch that was cut off or replaced, from its size and its header alone.

    Args:
        path: Result of `epoch_file`.
        images: Number of training images.

    Raises:
        ACKDError: If it is damaged, or holds the logits of another number of images.
    """
    try:
        with safe_open(path, framework="pt") as file:
            rows = file.get_slice("logits").get_shape()[0]
    except (SafetensorError, OSError, KeyError, IndexError) as error:
        raise _damaged(path, first_line(error)) from error
    if rows != images:
        raise _damaged(path, f"it holds logits of {rows:,} images and not of {images:,}")


def _damaged(path: Path, reason: str) -> ACKDError:
    return ACKDError(f"{path} cannot be read ({reason}); remove it and run `ackd cache` again")


class TeacherCache:
    """Logits that ``ackd cache`` wrote.

    Args:
        folder: Folder of the cache.
        key: Result of `view_key` for this run.
        epochs: Number of epochs of this run.

    Raises:
        ACKDError: If the cache does not exist, was made for other views, has too few epochs, or a damaged file.

    Attributes:
        compared: Whether logits were compared with those of the teacher.
    """

    def __init__(self, folder: Path, key: dict[str, Any], epochs: int) -> None:
        self.folder = folder
        check_key(folder, key)
        missing = [epoch for epoch in range(epochs) if not epoch_file(folder, epoch).is_file()]
        if missing:
            raise ACKDError(
                f"teacher.cache {folder} lacks epoch {missing[0] + 1} of {epochs}; complete it by `ackd cache --out "
                f"{folder}` with the settings of this run"
            )
        for epoch in range(epochs):
            check_epoch(epoch_file(folder, epoch), images=key["images"])
        self.compared = False
        self._epoch = -1
        self._logits = torch.empty(0)

    def compare(self, logits: Tensor, computed: Tensor) -> None:
        """Compare logits with what the teacher says of the first batch: what its key says nothing of may differ.

        Args:
            logits: Result of `read`, ``B x K``.
            computed: The teacher's logits of the same images.

        Raises:
            ACKDError: If they differ by more than other precision and kernels can explain.
        """
        self.compared = True
        spread, difference = computed.float().std(), (logits - computed.float()).abs().mean()
        if not bool(difference <= _TOLERANCE * spread):
            raise ACKDError(
                f"teacher.cache {self.folder} does not hold what this run's teacher says of its first batch: logits "
                f"differ by {float(difference):.2g} on average and have a standard deviation of {float(spread):.2g}; "
                "compare the teacher's options and code with those of the cache, or create "
                "another cache with `ackd cache`"
            )

    def read(self, epoch: int, index: Tensor) -> NetOutput:
        """Return the teacher's output for views of an epoch: its logits, without features.

        Args:
            epoch: Number of the epoch, from 0.
            index: Positions in the training part, ``B`` int64.

        Raises:
            ACKDError: If the file of that epoch is damaged.
        """
        if epoch != self._epoch:
            path = epoch_file(self.folder, epoch)
            try:
                self._logits = load_file(path)["logits"].to(index.device)
            except (SafetensorError, OSError, KeyError) as error:
                raise _damaged(path, first_line(error)) from error
            self._epoch = epoch
        logits = self._logits[index].float()
        return NetOutput(logits)


def open_cache(
    module: TrainingModule, data: Any, *, epochs: int | None, precision: str, overfits: bool = False
) -> TeacherCache | None:
    """Open the cache of logits that a teacher's settings name; None where none is named.

    Args:
        module: Module whose teachers are loaded.
        data: Data module that is set up; None for loaders alone.
        epochs: Number of epochs of the training; None when it is not limited by epochs.
        precision: Lightning's name of the precision of the forward pass.
        overfits: Whether the training reads a few images without augmentation, as with ``overfit_batches``.

    Raises:
        ACKDError: If the training does not fit a cache, or the cache is of another training.
    """
    folders = dict.fromkeys(each.cache for each in module.teachers.configs if each.cache is not None)
    if not folders:
        return None
    folder, *others = folders
    if others:
        raise ACKDError(
            f"teacher.cache is {folder} for one teacher and {others[0]} for another, and a cache has the mean of all "
            "of them; name one"
        )
    if not isinstance(data, ImageDataModule) or not epochs or epochs < 1:
        raise ACKDError(
            f"teacher.cache is {folder} and works with this package's data modules and a fixed trainer.max_epochs "
            "only; leave it out"
        )
    if overfits:
        raise ACKDError(
            f"teacher.cache {folder} holds logits of augmented images and trainer.overfit_batches reads them without "
            "augmentation; leave one of them out"
        )
    return TeacherCache(Path(folder), view_key(module, data, precision), epochs)


def check_key(folder: Path, key: dict[str, Any]) -> None:
    """Refuse a cache that was made for other views.

    Args:
        folder: Folder of the cache.
        key: Result of `view_key` for this run.

    Raises:
        ACKDError: Naming what differs.
    """
    path = folder / KEY_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ACKDError(
            f"teacher.cache {folder} is not a cache (it has no {KEY_FILE}); create one with `ackd cache --out {folder}`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ACKDError(
            f"{path} cannot be read ({str(error)[:100]}); remove the folder and run `ackd cache` again"
        ) from error
    here, there = _entries(key), _entries(stored if isinstance(stored, dict) else {})
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            if name == "targets":
                raise ACKDError(
                    f"teacher.cache {folder} was made with other training images or classes than this run has; create "
                    "another cache for it with `ackd cache`"
                )
            found, value = (str(each.get(name))[:40] for each in (there, here))
            raise ACKDError(
                f"teacher.cache {folder} was made with {name} {found!r} and this run has {value!r}; create another "
                "cache for it with `ackd cache`"
            )


def _entries(key: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a key, those of each teacher and of the augmentation by their own names."""
    changes = key.get("augmentation")
    if isinstance(changes, dict):
        own = {f"augmentation.{name}": value for name, value in changes.items()}
        key = {name: value for name, value in key.items() if name != "augmentation"} | own
    teachers = key.get("teachers")
    if not isinstance(teachers, list) or not all(isinstance(each, dict) for each in teachers):
        return key
    flat: dict[str, Any] = {"number of teachers": len(teachers)}
    for number, teacher in enumerate(teachers):
        prefix = f"teacher {number + 1}" if len(teachers) > 1 else "teacher"
        flat.update({f"{prefix}: {name}": value for name, value in teacher.items()})
    return {**flat, **{name: value for name, value in key.items() if name != "teachers"}}


@torch.no_grad()
def fill(
    folder: Path, module: TrainingModule, data: ImageDataModule, *, epochs: int, precision: str
) -> Iterator[tuple[int, Path | None]]:
    """Write the epochs that are missing, one file each.

    The batches are those of the training, so that the forward passes are the same. A file gets its name when it is
    complete.

    Args:
        folder: Folder of the cache; created if it does not exist.
        module: Module whose teacher is loaded, on its device.
        data: Data module that is set up.
        epochs: Number of epochs.
        precision: Lightning's name of the precision of the forward pass.

    Yields:
        Number of the epoch and its file, or None instead of a file that existed.

    Raises:
        ACKDError: If the folder holds a cache of other views, or a damaged file.
    """
    key = view_key(module, data, precision)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / KEY_FILE).is_file():
        check_key(folder, key)
    else:
        write_json(key, folder / KEY_FILE)
    for epoch in range(epochs):
        path = epoch_file(folder, epoch)
        if path.is_file():
            check_epoch(path, images=key["images"])
            yield epoch, None
            continue
        logits = torch.full((key["images"], module.data.num_classes), torch.nan)
        for index, scores in teacher_logits(module, data, epoch=epoch, precision=precision):
            logits[index] = scores
        half = logits.bfloat16()
        exact = torch.equal(half.float().nan_to_num(), logits.nan_to_num())  # computed in bfloat16
        try:
            with whole_file(path) as partial:
                save_file({"logits": half if exact else logits}, partial)
        except (SafetensorError, OSError) as error:
            raise ACKDError(
                f"{path} cannot be written ({error}); free disk space and run the command again, which goes on there"
            ) from error
        yield epoch, path


def teacher_logits(
    module: TrainingModule, data: ImageDataModule, *, epoch: int, precision: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the teacher on the batches of an epoch.

    Args:
        module: Module whose teacher is loaded.
        data: Data module that is set up.
        epoch: Number of the epoch, from 0.
        precision: ``bf16-mixed``; any other value stands for float32.

    Yields:
        Indices ``B`` and logits ``B x K`` float32, on the CPU.
    """
    loader, device = data.train_dataloader(), module.device
    cast(EpochSampler, loader.sampler).set_epoch(epoch)
    half = precision == "bf16-mixed"
    for raw in loader:
        moved = data.transfer_batch_to_device(raw, device, 0)
        batch = module.as_batch(data.on_after_batch_transfer(moved, 0))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            scores = module.teachers(batch.image).logits
        yield batch.index.cpu(), scores.float().cpu()
