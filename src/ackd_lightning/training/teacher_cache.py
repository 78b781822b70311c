"""A teacher's logits for every augmented view of a training, kept on disk and read instead of running the teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ackd_lightning.callbacks.protocol import TrainingModule
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.sampling import EpochSampler
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.files import write_json
from ackd_lightning.types import NetOutput

KEY_FILE = "key.json"
_VIEWS = 2
"""Raised whenever the same keys draw other views than before (2: crops of image files)."""


def view_key(module: TrainingModule, data: ImageDataModule, precision: str) -> dict[str, Any]:
    """What a teacher's logits for the views of a training depend on, as plain data.

    Args:
        module: with its teacher loaded.
        data: set up.
        precision: in which the forward pass is made, as Lightning names it.

    Raises:
        ACKDError: for a method that reads more of the teacher than its logits, or learns from none or several.
    """
    name = type(module.method).__name__
    if module.method.teacher != "logits":
        raise ACKDError(f"method {name} does not learn from a teacher's logits alone; leave teacher.cache out")
    (teacher,) = module.teachers.frozen
    targets = data.train_targets
    return {
        "teacher": teacher.metadata.get("sha256"),
        "model": teacher.metadata.get("model"),
        "data": type(data).__name__,
        "images": len(targets),
        "class_names": None if module.data.class_names is None else list(module.data.class_names),
        "targets": hashlib.sha256(targets.numpy().tobytes()).hexdigest(),
        "input_size": data.input_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "augment": data.augment,
        "views": _VIEWS,
        "seed of the data": data.run_seed,
        "batch_size": data.batch_size,
        "precision": f"{precision}{', teacher bf16' if teacher.bf16 else ''}",
    }


def epoch_file(folder: Path, epoch: int) -> Path:
    """File of an epoch's logits.

    Args:
        folder: of the cache.
        epoch: from 0.
    """
    return folder / f"epoch-{epoch:04d}.safetensors"


class TeacherCache:
    """Reads what ``ackd cache`` wrote.

    Args:
        folder: of the cache.
        key: of this run.
        epochs: that this run will ask for.

    Raises:
        ACKDError: when the cache is not there, was made for something else, or has too few epochs.
    """

    def __init__(self, folder: Path, key: dict[str, Any], epochs: int) -> None:
        self.folder = folder
        check_key(folder, key)
        missing = [epoch for epoch in range(epochs) if not epoch_file(folder, epoch).is_file()]
        if missing:
            raise ACKDError(
                f"teacher.cache {folder} lacks epoch {missing[0] + 1} of {epochs}; let `ackd cache` with the same "
                "settings finish it"
            )
        self._epoch = -1
        self._logits = torch.empty(0)

    def read(self, epoch: int, index: Tensor) -> NetOutput:
        """The teacher's output for views of an epoch, with logits alone.

        Args:
            epoch: from 0.
            index: ``B`` int64.

        Raises:
            ACKDError: when the file of that epoch is damaged.
        """
        if epoch != self._epoch:
            path = epoch_file(self.folder, epoch)
            try:
                self._logits = load_file(path)["logits"].to(index.device)
            except (SafetensorError, OSError, KeyError) as error:
                raise ACKDError(
                    f"{path} cannot be read ({str(error).splitlines()[0][:100]}); remove it and let `ackd cache` make "
                    "it again"
                ) from error
            self._epoch = epoch
        logits = self._logits[index].float()
        return NetOutput(logits)


def check_key(folder: Path, key: dict[str, Any]) -> None:
    """Refuse a cache that was made for something else.

    Args:
        folder: of the cache.
        key: as ``view_key`` gives it.

    Raises:
        ACKDError: naming what differs.
    """
    path = folder / KEY_FILE
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ACKDError(f"teacher.cache {folder} is no cache (no {KEY_FILE}); `ackd cache` makes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ACKDError(
            f"{path} cannot be read ({str(error)[:100]}); remove the folder, `ackd cache` makes it"
        ) from error
    for name, value in key.items():
        found = there.get(name) if isinstance(there, dict) else None
        if found != value:
            raise ACKDError(
                f"teacher.cache {folder} was made with {name} {str(found)[:40]!r} and this run has "
                f"{str(value)[:40]!r}; give it its own cache"
            )


@torch.no_grad()
def fill(
    folder: Path, module: TrainingModule, data: ImageDataModule, *, epochs: int, precision: str
) -> Iterator[tuple[int, Path | None]]:
    """Write the epochs that are missing, one file each; every file is there whole or not at all.

    The batches are those of the training, so that the forward passes are the same.

    Args:
        folder: of the cache; made if it is not there.
        module: with its teacher loaded, on the device.
        data: set up.
        epochs: E.
        precision: of the forward pass, as Lightning names it.

    Yields:
        Epoch and file; None for one that is there already.

    Raises:
        ACKDError: when the folder holds a cache of something else.
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
            yield epoch, None
            continue
        logits = torch.full((key["images"], module.data.num_classes), torch.nan)
        for index, scores in teacher_logits(module, data, epoch=epoch, precision=precision):
            logits[index] = scores
        half = logits.bfloat16()
        exact = torch.equal(half.float().nan_to_num(), logits.nan_to_num())  # computed in bfloat16
        partial = path.with_suffix(".partial")
        save_file({"logits": half if exact else logits}, partial)
        partial.replace(path)
        yield epoch, path


def teacher_logits(
    module: TrainingModule, data: ImageDataModule, *, epoch: int, precision: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The teacher's logits for the batches of an epoch.

    Args:
        module: with its teacher loaded.
        data: set up.
        epoch: from 0.
        precision: ``bf16-mixed``, or whatever else for float32.

    Yields:
        Indices ``B`` and logits ``B x K`` float32, on the CPU.
    """
    loader, device = data.train_dataloader(), module.device
    cast(EpochSampler, loader.sampler).set_epoch(epoch)
    (teacher,) = module.teachers.frozen
    half = precision == "bf16-mixed"
    for raw in loader:
        moved = data.transfer_batch_to_device(raw, device, 0)
        batch = module.as_batch(data.on_after_batch_transfer(moved, 0))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            scores = teacher(batch.image).logits
        yield batch.index.cpu(), scores.float().cpu()
