"""How long runs will take and how much they will write, roughly, without training."""

from __future__ import annotations

import time

import torch

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.zoo import create_model
from ackd_lightning.reproduce.planning import Job
from ackd_lightning.training.distillation import DistillationModule

_OVERHEAD = 1.3
"""Data, the method's own arithmetic, optimizer and evaluation on top of the networks; measured between 1.1 and 1.5."""


def train_images(data: ImageDataModule) -> int | None:
    """Images of one epoch; None when the data are not there and their number is not known beforehand.

    Args:
        data: not set up yet.
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
    """Times networks on this machine, each once."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.known: dict[tuple[str, int, bool], float] = {}

    def seconds(self, network: torch.nn.Module, name: str, size: int, *, train: bool) -> float:
        """Seconds for one image: forward, and backward when it trains.

        Args:
            network: maps images to a tensor or a ``NetOutput``.
            name: equal for equal networks.
            size: side of the images.
            train: with backward pass.
        """
        key = (name, size, train)
        if key not in self.known:
            count = 64 if self.device.type == "cuda" else max(2, min(16, 16 * 32**2 // size**2))
            image = torch.randn(count, 3, size, size, device=self.device)
            network.to(self.device).train(train)
            for _ in range(2):  # the first is warm-up
                begin = time.perf_counter()
                with torch.set_grad_enabled(train):
                    output = network(image)
                    logits = output if isinstance(output, torch.Tensor) else output.logits
                    branches = [] if isinstance(output, torch.Tensor) else [each.logits for each in output.branches]
                    if train:
                        torch.stack([each.float().sum() for each in (logits, *branches)]).sum().backward()  # type: ignore[no-untyped-call]
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                self.known[key] = (time.perf_counter() - begin) / count
            network.zero_grad(set_to_none=True)
            network.cpu()
        return self.known[key]

    def job(self, job: Job) -> float | None:
        """Seconds that a run takes, roughly.

        Args:
            job: planned.
        """
        images = train_images(job.planned.datamodule)
        if images is None:
            return None
        module: DistillationModule = job.planned.model
        size = module.input_size
        name = f"{job.settings['model.student']} {module.student.specs}"
        each = self.seconds(module.student, name, size, train=True)
        if module.method.needs_teacher:
            teacher = str(job.settings["model.teacher"])
            network = create_model(teacher, module.num_classes, **(job.settings.get("model.teacher_options") or {}))
            each += self.seconds(network, teacher, size, train=False)
        return each * images * job.epochs * _OVERHEAD


def megabytes(job: Job) -> float:
    """Size of a run's files in MB: checkpoints (weights and momentum) and the student.

    Args:
        job: planned.
    """
    module: DistillationModule = job.planned.model
    kept = 1 if job.planned.datamodule.val_is_test else 2
    trained = sum(each.numel() for each in (*module.student.parameters(), *module.method.parameters()))
    plain = sum(each.numel() for each in module.student.plain().parameters())
    return (kept * 8 * trained + 4 * plain) / 1e6
