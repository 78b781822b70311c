from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ackd_lightning import ACKDModule, DataInfo, DistillationModule, Method, TeacherConfig
from ackd_lightning.methods.guides import GuidedMethod
from ackd_lightning.models.features import StagePlan

SIZE = 8
CLASSES = 4
DATA = DataInfo(CLASSES, SIZE)
NORMALISED = DataInfo(CLASSES, SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)


class TinyNet(nn.Module):
    """Three stages on 8 x 8 images: everything that a CIFAR network has, in a millisecond."""

    stage_plan = StagePlan(("stem", "one", "two", "three"), classifier="fc")

    def __init__(self, width: int = 4, *, norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            middle: list[nn.Module] = [nn.BatchNorm2d(outputs)] if norm else []
            last: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), *middle, nn.ReLU(), *last)

        self.stem = block(3, width, 1)
        self.one, self.two, self.three = block(width, width, 1), block(width, width, 2), block(width, 2 * width, 2)
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        feature = self.three(self.two(self.one(self.stem(image))))
        return self.fc(feature.mean(dim=(2, 3)))


class Blobs(L.LightningDataModule):
    """64 noisy images whose colour depends on the class; the same global batches for any number of processes."""

    def __init__(self, batch_size: int = 8, count: int = 64) -> None:
        super().__init__()
        self.global_batch, self.count = batch_size, count

    def _data(self, seed: int, count: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        target = torch.arange(count) % CLASSES
        colour = torch.eye(CLASSES)[target][:, :3, None, None]
        return TensorDataset(colour + 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator), target)

    def train_dataloader(self) -> DataLoader[Any]:
        data, trainer = self._data(0, self.count), self.trainer
        assert trainer is not None
        sampler = DistributedSampler(data, trainer.world_size, trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.global_batch // trainer.world_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._data(1, 32), batch_size=16)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


class IndexedBlobs(Blobs):
    """The same with what some methods need of a data module: indices, targets and the global batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = self.global_batch

    @property
    def train_targets(self) -> Tensor:
        return self._data(0, self.count).tensors[1]

    def _data(self, seed: int, count: int) -> TensorDataset:
        return TensorDataset(*super()._data(seed, count).tensors, torch.arange(count))


class BadImages(Blobs):
    """Blobs with a pixel that is not a number, in global batch ``bad`` of every epoch."""

    bad = 3

    def _data(self, seed, count):
        data = super()._data(seed, count)
        if seed == 0:
            data.tensors[0][self.global_batch * self.bad, 0, 0, 0] = float("nan")
        return data


def sgd(lr: float = 0.05) -> functools.partial[SGD]:
    """SGD as in the paper, at a learning rate for small networks."""
    return functools.partial(SGD, lr=lr, momentum=0.9, weight_decay=5e-4)


def milestones(*epochs: int) -> functools.partial[MultiStepLR]:
    """Learning rate that is divided by 10 after some epochs."""
    return functools.partial(MultiStepLR, milestones=list(epochs), gamma=0.1)


def teaching(network: str | nn.Module | None = None, *, gate: str = "off", **options: Any) -> TeacherConfig:
    """Teacher whose accuracy is not measured."""
    return TeacherConfig(network=TinyNet(8) if network is None else network, gate=gate, **options)


def build(
    method: Method | None = None,
    *,
    kind: type[DistillationModule] = DistillationModule,
    student: str | nn.Module | None = None,
    lr: float = 0.05,
    decays: Sequence[int] = (2,),
    seed: int = 0,
    gate: str = "off",
    teacher_norm: bool = True,
    norm: bool = True,
    dropout: float = 0.0,
    **options: Any,
) -> Any:
    """Build a module of any method on tiny networks, the same in every call."""
    torch.manual_seed(seed)
    teachers = [TinyNet(8, norm=teacher_norm)]
    student = TinyNet(norm=norm, dropout=dropout) if student is None else student
    usual: dict[str, Any] = {"data": DATA, "optimizer": sgd(lr), "lr_scheduler": milestones(*decays)}
    if isinstance(method, GuidedMethod):
        teachers.append(TinyNet(6, norm=teacher_norm))
    usual["teacher"] = [teaching(each, gate=gate) for each in teachers]
    return kind(student, method=method, **{**usual, **options})


def game(method: Method, *, norm: bool = True, **options: Any) -> DistillationModule:
    """Build a module of a method that knows the range of its pixels."""
    return build(method, **{"norm": norm, "teacher_norm": norm, "data": NORMALISED, **options})


def module(method: Method | None = None, **options: Any) -> ACKDModule:
    """Build an ACKD module."""
    return build(method, **{"kind": ACKDModule, **options})


def trainer(**options: Any) -> L.Trainer:
    """Build a quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**quiet, **options})


def state(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in net.state_dict().items()}


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)
