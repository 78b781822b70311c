"""``ackd cache``: run a teacher once over every augmented view of a training, for all runs with the same views."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ackd_lightning.callbacks.progress import clock
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.launch.execute import plan
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.runs.claim import claim
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.training.teacher_cache import check_processes, epoch_file, fill, teacher_logits, view_key

_TIMED = 3  # batches, after one that is not timed
_PRECISIONS = ("32-true", "bf16-mixed")


def cache(arguments: Sequence[str], *, out: str | None, estimate: bool) -> None:
    """Write a cache of the teacher's logits, or estimate its size and duration.

    Args:
        arguments: Command line of the `ackd fit` that will read the cache.
        out: Folder of the cache; None: the one that the settings name, else ``teacher-cache``.
        estimate: Whether to time a few batches and print disk space and time, without writing anything.

    Raises:
        ACKDError: When runs with these settings cannot use a cache.
    """
    planned = plan(arguments)
    module, data = planned.model, planned.images
    named = next((each.cache for each in module.teachers.configs if each.cache is not None), "teacher-cache")
    folder = Path(named if out is None else out)
    precision = str(planned.option("trainer.precision") or "32-true")
    epochs = planned.option("trainer.max_epochs")
    if precision not in _PRECISIONS:
        raise ACKDError(f"trainer.precision is {precision}; `ackd cache` supports {', '.join(_PRECISIONS)}")
    if not epochs or epochs < 1:
        raise ACKDError(f"trainer.max_epochs is {epochs}; a cache needs a number of epochs, 1 or more")
    if module.method.teacher == "none":
        raise ACKDError(
            f"method {type(module.method).__name__} has no teacher whose logits could be cached; choose another method"
        )
    devices = planned.option("trainer.devices")
    processes = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    check_processes(data, processes * int(planned.option("trainer.num_nodes") or 1))
    if not estimate:
        check_writable(folder, "--out")
    module.load_teacher()
    data.prepare_data()
    data.setup()
    module.match_classes(data)
    accelerator = str(planned.option("trainer.accelerator"))
    module.to("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    images = view_key(module, data, precision)["images"]
    if estimate:
        _print_estimate(module, data, epochs=epochs, precision=precision, images=images)
        return
    started, done, where = time.monotonic(), 0, folder.resolve()
    with claim(where.parent, where.name, resume=True, option="--out"):
        for epoch, path in fill(folder, module, data, epochs=epochs, precision=precision):
            if path is None:
                continue
            done += 1
            each = (time.monotonic() - started) / done
            left = sum(not epoch_file(folder, later).is_file() for later in range(epoch + 1, epochs))
            print(f"epoch {epoch + 1}/{epochs}  {each:.1f} s/epoch  {clock(left * each)} left", flush=True)
    size = sum(epoch_file(folder, epoch).stat().st_size for epoch in range(epochs))
    option = "--model.teacher.0.cache" if len(module.teachers.configs) > 1 else "--model.teacher.cache"
    print(
        f"{folder}: {count_of(epochs, 'epoch')}, {size / 1e6:,.1f} MB; use it with {option} {folder} and the same "
        "settings"
    )


def _print_estimate(
    module: DistillationModule, data: ImageDataModule, *, epochs: int, precision: str, images: int
) -> None:
    steps = teacher_logits(module, data, epoch=0, precision=precision)
    next(steps)
    started, seen = time.monotonic(), 0
    with torch.no_grad():
        for _, scores in zip(range(_TIMED), steps, strict=False):
            seen += len(scores)
    seconds = (time.monotonic() - started) / max(seen, 1) * images * epochs
    classes = module.data.num_classes
    size = images * epochs * classes * (2 if precision == "bf16-mixed" else 4)
    print(
        f"{images:,} images x {count_of(epochs, 'epoch')} x {classes} classes: {size / 1e6:,.1f} MB on disk; every run "
        f"that reads the cache saves {clock(seconds)} of the teacher's time on {module.device.type}"
    )
