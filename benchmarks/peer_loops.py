"""KD as other programs train it: the usual loop, torchdistill, a Lightning script, and Hugging Face's Trainer.

Each side gets the same networks, batch size and images, loads them with torchvision's transforms in worker processes,
computes 0.1 CE + 0.9 KD at temperature 4 in float32, and returns the seconds of a step after its warm-up.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing.machine import wait
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


@dataclass
class Case:
    """One measurement.

    Attributes:
        teacher: Teacher in evaluation mode, on the device.
        student: Student, on the device.
        classes: Number of classes.
        size: Side of the images in pixels.
        batch: Batch size.
        workers: Processes that load images.
        warmup: Steps before the timed ones.
        steps: Timed steps.
        device: Device that computes.
    """

    teacher: nn.Module
    student: nn.Module
    classes: int
    size: int
    batch: int
    workers: int
    warmup: int
    steps: int
    device: torch.device

    def loader(self) -> DataLoader[Any]:
        """Images of enough batches for all steps."""
        images = RandomImages(self.batch * (self.warmup + self.steps + 1), self.classes, self.size)
        pinned = self.device.type == "cuda"
        return DataLoader(images, self.batch, shuffle=True, num_workers=self.workers, pin_memory=pinned, drop_last=True)


class RandomImages(Dataset[Any]):
    """Random images in memory with the usual transforms of CIFAR, one by one.

    Args:
        count: Number of images.
        classes: Number of classes.
        size: Side in pixels.
    """

    def __init__(self, count: int, classes: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator).numpy()
        self.targets = torch.randint(classes, (count,), generator=generator).tolist()
        self.transform = v2.Compose(
            [
                v2.ToPILImage(),
                v2.RandomCrop(size, padding=size // 8),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
            ]
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(self.images[number]), self.targets[number]


class StepClock:
    """Seconds of a step, from the end of the warm-up to the last of the timed steps.

    Args:
        case: Measurement.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.count, self.begin, self.seconds = case, 0, 0.0, 0.0

    def tick(self) -> bool:
        """Note that a step has ended; True after the last."""
        self.count += 1
        if self.count == self.case.warmup:
            wait(self.case.device)
            self.begin = time.perf_counter()
        if self.count == self.case.warmup + self.case.steps:
            wait(self.case.device)
            self.seconds = (time.perf_counter() - self.begin) / self.case.steps
        return self.count >= self.case.warmup + self.case.steps


def kd_terms(logits: Tensor, soft: Tensor, target: Tensor) -> Tensor:
    """0.1 CE + 0.9 KD."""
    log_student = F.log_softmax(logits / 4.0, dim=1)
    kd = F.kl_div(log_student, F.softmax(soft / 4.0, dim=1), reduction="batchmean") * 16.0
    return 0.1 * F.cross_entropy(logits, target) + 0.9 * kd


# ---------------------------------------------------------------- a loop as in RepDistiller


def loop(case: Case) -> float:
    """The usual loop of research code: a criterion per term, running means of loss and accuracies by ``.item()``."""
    optimizer = torch.optim.SGD(case.student.parameters(), **SGD)
    case.student.train()
    sums, seen, clock = [0.0, 0.0, 0.0], 0, StepClock(case)
    for image, target in case.loader():
        image, target = image.float().to(case.device), target.to(case.device)
        logits = case.student(image)
        with torch.no_grad():
            soft = case.teacher(image)
        loss = kd_terms(logits, soft, target)
        top = logits.topk(5, dim=1).indices.t()
        right = top.eq(target.view(1, -1).expand_as(top))
        for place, value in enumerate((loss, right[:1].float().sum(), right.float().sum())):
            sums[place] += value.item() * (len(target) if place == 0 else 1)
        seen += len(target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if clock.tick():
            break
    return clock.seconds


# ---------------------------------------------------------------- torchdistill


def torchdistill(case: Case) -> float:
    """Its distillation box with the KD criterion, trained as in its examples."""
    from torchdistill.core.distillation import get_distillation_box
    from torchdistill.misc.log import MetricLogger, SmoothedValue

    images = case.loader()
    reads = {"forward_proc": "forward_batch_only", "frozen_modules": [], "wrapper": None}
    ends = {
        f"{side}_module_{key}": value
        for side in ("student", "teacher")
        for key, value in (("path", "."), ("io", "output"))
    }
    kd = {"key": "KDLoss", "kwargs": {**ends, "temperature": 4.0, "alpha": 0.1, "reduction": "batchmean"}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {
                "batch_size": case.batch,
                "num_workers": case.workers,
                "pin_memory": images.pin_memory,
                "drop_last": True,
            },
        },
        "teacher": {**reads, "requires_grad": False},
        "student": {**reads, "requires_grad": True},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD)},
    }
    box = get_distillation_box(
        case.teacher, case.student, {"train": images.dataset}, config, case.device, None, False, 1.0
    )
    log = MetricLogger(delimiter="  ")
    log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    box.student_model.train()
    box.teacher_model.eval()
    clock = StepClock(case)
    for image, target, extra in log.log_every(box.train_data_loader, 1000, "Epoch: [0]"):
        image, target = image.to(case.device), target.to(case.device)
        loss = box.forward_process(image, target, extra)
        box.post_forward_process(loss=loss)
        log.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        if clock.tick():
            break
    return clock.seconds


# ---------------------------------------------------------------- Lightning


def lightning(case: Case) -> float:
    """A short LightningModule as in tutorials: automatic optimization, logged loss and accuracy, progress bar off."""
    import lightning.pytorch as L
    from lightning.pytorch.loggers import CSVLogger
    from torchmetrics.classification import MulticlassAccuracy

    clock = StepClock(case)

    class Distiller(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = case.student, case.teacher.requires_grad_(False)
            self.accuracy = MulticlassAccuracy(case.classes, average="micro")

        def training_step(self, batch, batch_idx):
            image, target = batch
            logits = self.student(image)
            with torch.no_grad():
                soft = self.teacher(image)
            loss = kd_terms(logits, soft, target)
            self.accuracy(logits, target)
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
            return loss

        def on_train_epoch_start(self):
            self.teacher.eval()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            clock.tick()

        def configure_optimizers(self):
            return torch.optim.SGD(self.student.parameters(), **SGD)

    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=case.warmup + case.steps,
            default_root_dir=folder,
            accelerator="gpu" if case.device.type == "cuda" else "cpu",
            devices=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=CSVLogger(folder),
        ).fit(Distiller(), case.loader())
    return clock.seconds


# ---------------------------------------------------------------- Hugging Face


def trainer(case: Case) -> float:
    """Hugging Face's Trainer with ``compute_loss`` of its knowledge distillation guide."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = StepClock(case)

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.tick()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = case.student

        def forward(self, pixel_values, labels=None):
            return {"logits": self.network(pixel_values)}

    class Distiller(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            outputs = model(pixel_values=inputs["pixel_values"])
            with torch.no_grad():
                soft = case.teacher(inputs["pixel_values"])
            loss = kd_terms(outputs["logits"], soft, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    def collate(rows):
        images, targets = zip(*rows, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(targets)}

    loader = case.loader()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=case.warmup + case.steps,
            per_device_train_batch_size=case.batch,
            dataloader_num_workers=case.workers,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=case.device.type == "cpu",
        )
        optimizer = torch.optim.SGD(case.student.parameters(), **SGD)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        Distiller(
            model=Network(),
            args=arguments,
            train_dataset=loader.dataset,
            data_collator=collate,
            optimizers=(optimizer, schedule),
            callbacks=[Tick()],
        ).train()
    return clock.seconds


PEERS = {"loop": loop, "torchdistill": torchdistill, "lightning": lightning, "trainer": trainer}
NEEDS = {"loop": (), "torchdistill": ("torchdistill",), "lightning": (), "trainer": ("transformers", "accelerate")}


def lacks(name: str) -> list[str]:
    """Packages that a side needs and that are not installed.

    Args:
        name: Key of ``PEERS``.
    """
    return [each for each in NEEDS[name] if importlib.util.find_spec(each) is None]
