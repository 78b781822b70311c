"""Rough estimates of the duration and disk space of runs, without training."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable

import torch

from ackd_lightning.commands.reproduce.jobs import Job
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training.students import build_student

_OVERHEAD = 1.3
"""Factor for data, method, optimizer and evaluation in addition to the networks; measured between 1.1 and 1.5."""

_PASSES, _IMAGES = 2, 8
"""Passes that are timed, and images of a pass at 32 x 32 on a CPU."""


def train_images(data: ImageDataModule) -> int | None:
    """Number of images of an epoch; None when the data are missing and their number is not published.

    Args:
        data: Data module before its setup.
    """
    total = type(data).published_train_images
    if total is None:
        try:
            data.setup()
        except (ACKDError, OSError):
            return None
        return data.num_train_samples
    kept = total * (1 - data.val_fraction) * data.train_fraction
    return int(kept if data.max_per_class is None else min(kept, data.max_per_class * data.num_classes))


class Stopwatch:
    """Times networks on this machine, every network once."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.known: dict[tuple[str, tuple[int, int, int], bool], float] = {}

    def seconds(
        self, make: Callable[[], torch.nn.Module], name: str, shape: tuple[int, int, int], *, train: bool
    ) -> float:
        """Seconds per image.

        Args:
            make: Function that builds the network, which returns a tensor or a ``NetOutput``.
            name: Name, equal for equal networks.
            shape: ``(C, H, W)`` of an image.
            train: Whether to include the backward pass.
        """
        key = (name, shape, train)
        if key not in self.known:
            count = 64 if self.device.type == "cuda" else max(2, min(_IMAGES, _IMAGES * 32**2 // (shape[1] * shape[2])))
            image = torch.randn(count, *shape, device=self.device)
            network = make().to(self.device).train(train)
            times = []
            for _ in range(1 + _PASSES):  # the first is warm-up
                begin = time.perf_counter()
                with torch.set_grad_enabled(train):
                    output = network(image)
                    logits = output if isinstance(output, torch.Tensor) else output.logits
                    branches = [] if isinstance(output, torch.Tensor) else [each.logits for each in output.branches]
                    if train:
                        torch.stack([each.float().sum() for each in (logits, *branches)]).sum().backward()  # type: ignore[no-untyped-call]
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - begin) / count)
            self.known[key] = min(times[1:])  # other load makes a pass longer, never shorter
            del network, output, logits, branches
            gc.collect()  # a network whose stages are watched is part of a circle
        return self.known[key]

    def job(self, job: Job) -> float | None:
        """Rough duration of a run in seconds; None when its data are missing.

        Args:
            job: Planned run.
        """
        images = train_images(job.images)
        if images is None:
            return None
        networks, data = job.networks, job.networks.data
        shape = data.image_shape

        def student() -> torch.nn.Module:
            return build_student(networks.student_config, networks.branches, data)[0]

        each = self.seconds(student, networks.student, shape, train=True)
        for name, options in networks.teachers:
            make = functools.partial(create_model, name, data.num_classes, **options)
            each += self.seconds(make, name, shape, train=False)
        return each * images * job.epochs * _OVERHEAD


def megabytes(job: Job) -> float:
    """Size of the files of a run in MB: checkpoints (weights, momentum, memories of the method) and the student.

    Args:
        job: Planned run.
    """
    data, networks = job.images, job.networks
    kept = 1 if data.val_is_test else 2
    memory = networks.bytes_per_image * (train_images(data) or 0) if networks.bytes_per_image else 0.0
    return (kept * (8 * networks.trained + memory) + 4 * networks.kept) / 1e6
