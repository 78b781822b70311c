"""Drive a method as the training module does: for tests, benchmarks and authors of methods outside this package."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

from ackd_lightning.methods.base import FitInfo, Method, weighted_loss
from ackd_lightning.methods.guides import GuidedMethod
from ackd_lightning.models.freezing import frozen
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.types import Batch, DataInfo, ImageSize, NetOutput, height_width


class RandomImages(L.LightningDataModule):
    """Random images whose mean colour depends on the class.

    Args:
        num_classes: K.
        input_size: Side in pixels, or height and width.
        count: Number of images.
        batch_size: Images in a batch.
    """

    def __init__(
        self, *, num_classes: int = 5, input_size: ImageSize = 16, count: int = 80, batch_size: int = 8
    ) -> None:
        super().__init__()
        self.info = DataInfo(num_classes, input_size, mean=(0.5,) * 3, std=(0.25,) * 3)
        self.batch_size = batch_size
        self.train_targets = torch.arange(count) % num_classes
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(count, 3, *height_width(input_size), generator=generator)
        self.images = noise + torch.randn(num_classes, 3, 1, 1, generator=generator)[self.train_targets]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the images in order, with targets and indices."""
        indices = torch.arange(len(self.images))
        return DataLoader(TensorDataset(self.images, self.train_targets, indices), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the same images."""
        return self.train_dataloader()

    def batch(self, number: int = 0) -> Batch:
        """Return one batch.

        Args:
            number: Number of the batch, from 0.
        """
        index = torch.arange(number * self.batch_size, (number + 1) * self.batch_size) % len(self.images)
        return Batch(self.images[index], self.train_targets[index], index)


class _Recorder(L.Callback):
    """Weighted loss of every training step, as the module logs it; ends the training after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss_step"]))
        trainer.should_stop = len(self.losses) >= self.steps


class Harness:
    """A method on small networks and random images, built and trained by a `DistillationModule`.

    Args:
        method: Method to drive.
        student: Model name or network.
        teacher: Model name or network with random weights; several for methods that learn from several. None for
            resnet14, and for resnet20 and resnet14 where a method needs several.
        data: Images; small random ones by default.
        lr: Learning rate of SGD with momentum 0.9 and weight decay 5e-4, times 0.1 after the first epoch.
        seed: Seed of the weights.
        arguments: Further arguments of the module.

    Examples:
        >>> from ackd_lightning.methods import KD
        >>> harness = Harness(KD())
        >>> sorted(harness.terms())
        ['ce', 'kd']
        >>> len(harness.train(steps=3))
        3
    """

    def __init__(
        self,
        method: Method,
        *,
        student: str | nn.Module = "resnet8",
        teacher: str | nn.Module | Sequence[str | nn.Module] | None = None,
        data: RandomImages | None = None,
        lr: float = 0.02,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        self.data = data or RandomImages()
        classes = self.data.info.num_classes
        torch.manual_seed(seed)
        if teacher is None:
            teacher = ("resnet20", "resnet14") if isinstance(method, GuidedMethod) else "resnet14"
        given = [teacher] if isinstance(teacher, (str, nn.Module)) else list(teacher)
        networks = [create_model(each, classes) if isinstance(each, str) else each for each in given]
        info = self.data.info
        configs = [
            TeacherConfig(network=each, gate="off")
            if isinstance(each, FrozenTeacher)
            else TeacherConfig(network=each, mean=info.mean, std=info.std, gate="off")
            for each in networks
        ]
        usual: dict[str, Any] = {
            "optimizer": functools.partial(SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
            "lr_scheduler": functools.partial(MultiStepLR, milestones=[1]),
            "seed": seed,
        }
        self.module = DistillationModule(
            student, method=method, teacher=configs, data=self.data.info, **{**usual, **arguments}
        )
        self.method = method
        self._begun = False

    def begin_fit(self, *, epochs: int = 100, epoch: int = 0) -> None:
        """Tell the method that a fit starts, as the module does; `train` does it by itself.

        Args:
            epochs: Length of the fit.
            epoch: Epoch in which the fit starts or resumes.
        """
        self._begun = True
        self.method.begin_fit(
            FitInfo(
                epochs=epochs,
                batch_size=self.data.batch_size,
                targets=self.data.train_targets,
                seed=self.module.seed,
                teachers=self.module.teachers.frozen,
            )
        )
        self.method.set_epoch(epoch)

    def outputs(self, batch: Batch | None = None) -> tuple[NetOutput, NetOutput | None, Batch]:
        """Return the arguments of the method's ``forward``.

        Args:
            batch: Batch of images; the first of the data by default.
        """
        if not self._begun:
            self.begin_fit()
        batch = batch or self.data.batch()
        return (*self.module.outputs(batch), batch)

    def terms(self, batch: Batch | None = None) -> dict[str, Tensor]:
        """Return the unweighted terms of a batch.

        Args:
            batch: Batch of images; the first of the data by default.
        """
        return dict(self.method(*self.outputs(batch)))

    def loss(self, batch: Batch | None = None) -> Tensor:
        """Return the weighted loss of a batch.

        Args:
            batch: Batch of images; the first of the data by default.
        """
        return weighted_loss(self.method, self.terms(batch))

    def step(self, batch: Batch | None = None) -> Tensor:
        """Run one step without an optimizer: terms with frozen auxiliary parameters, backward pass, memories.

        Args:
            batch: Batch of images; the first of the data by default.

        Returns:
            The weighted loss, whose gradients are in the parameters.
        """
        outputs = self.outputs(batch)
        with frozen(each for parameters in self.method.auxiliary_parameters().values() for each in parameters):
            loss = weighted_loss(self.method, self.method(*outputs))
            loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.method.update(*outputs)
        return loss.detach()

    def train(self, steps: int) -> list[float]:
        """Train with Lightning's Trainer on the CPU and return the weighted loss of every step.

        Args:
            steps: Number of steps.
        """
        recorder = _Recorder(steps)
        per_epoch = len(self.data.images) // self.data.batch_size
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-(-steps // per_epoch),
            limit_train_batches=min(steps, per_epoch),
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            log_every_n_steps=1,
        )
        trainer.fit(self.module, datamodule=self.data)
        return recorder.losses
