"""Rough estimates of the duration and disk space of runs, without training."""

from __future__ import annotations

import functools

import torch

from ackd_lightning.commands.reproduce.jobs import Job
from ackd_lightning.commands.stopwatch import OVERHEAD, Stopwatch
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training.students import build_student


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


def job_seconds(watch: Stopwatch, job: Job) -> float | None:
    """Rough duration of a run in seconds; None when its data are missing.

    Args:
        watch: Stopwatch that times the networks.
        job: Planned run.
    """
    images = train_images(job.images)
    if images is None:
        return None
    networks, data = job.networks, job.networks.data
    shape = data.image_shape

    def student() -> torch.nn.Module:
        return build_student(networks.student_config, networks.branches, data)[0]

    each = watch.seconds(student, networks.student, shape, train=True)
    for name, options in networks.teachers:
        make = functools.partial(create_model, name, data.num_classes, **options)
        each += watch.seconds(make, name, shape, train=False)
    return each * images * job.epochs * OVERHEAD


def megabytes(job: Job) -> float:
    """Size of the files of a run in MB: checkpoints (weights, momentum, memories of the method) and the student.

    Args:
        job: Planned run.
    """
    data, networks = job.images, job.networks
    kept = 1 if data.val_is_test else 2
    memory = networks.bytes_per_image * (train_images(data) or 0) if networks.bytes_per_image else 0.0
    return (kept * (8 * networks.trained + memory) + 4 * networks.kept) / 1e6
