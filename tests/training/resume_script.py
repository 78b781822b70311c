"""Fits that are stopped and resumed; imported by test_stopping.py, which also starts it with two processes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from ackd_lightning import DataInfo, DigitsDataModule, DistillationModule
from ackd_lightning.callbacks.checkpoints import WholeCheckpoints, checkpoints
from ackd_lightning.callbacks.stopping import StopSafely
from ackd_lightning.data import Augmentation
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import RunStoppedError
from ackd_lightning.methods import ACKD, ACN, AIKD, ATSC, CRD, KD, ONE
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training import Recipe
from training.helpers import milestones, sgd, state, teaching

EPOCHS, BATCH, PER_CLASS = 3, 16, 8  # 5 steps an epoch


class Signal(L.Callback):
    """Send this process a signal inside a step, or inside validation."""

    def __init__(self, step: int, number: int, *, validating: bool = False, rank: int = 0) -> None:
        self.step, self.number, self.validating, self.rank = step, number, validating, rank
        self.sent = False

    def _send(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """With discriminators the first of these is theirs, before the student's step."""
        if not self.validating:
            self._send(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.validating and not trainer.sanity_checking:
            self._send(trainer)


class Noisy(torch.nn.Module):
    """A classifier after dropout."""

    def __init__(self, classifier: torch.nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, embedding: Tensor) -> Tensor:
        return self.classifier(torch.nn.functional.dropout(embedding, 0.3, self.training))


def network() -> torch.nn.Module:
    net = create_model("resnet8", 10)
    net.fc = Noisy(net.fc)  # dropout must draw the same masks after a stop
    return net


METHODS: dict[str, Any] = {
    "ackd": lambda: ACKD(discriminator_lr=0.05),
    "atsc": lambda: ATSC(classifier_lr=0.05),
    "aikd": lambda: AIKD(discriminator_lr=1e-2),
    "aikd_table": lambda: AIKD(previous="table", discriminator_lr=1e-2),
    "acn": lambda: ACN(warmup_epochs=1, generator_width=4),
    "crd": lambda: CRD(negatives=32),
    "one": lambda: ONE(ramp_epochs=2),
    "recipe": KD,
}
RECIPE = Recipe(label_smoothing=0.1, class_weights=[0.5, 1.5] * 5, ema_decay=0.9, early_stopping=50)
AUGMENTATION = Augmentation(policy="randaugment", erasing=0.25, mixup=0.8, cutmix=1.0)


def module(method: str) -> DistillationModule:
    torch.manual_seed(0)
    teacher = teaching(create_model("resnet8", 10))
    data = DataInfo(10, 16, mean=(0.5,) * 3, std=(0.5,) * 3)
    return DistillationModule(
        network(),
        method=METHODS[method](),
        teacher=teacher,
        data=data,
        optimizer=sgd(),
        lr_scheduler=milestones(1, 2),
        recipe=RECIPE if method == "recipe" else None,
        seed=0,
    )


def data(workers: int = 0, **options: Any) -> ImageDataModule:
    return DigitsDataModule(batch_size=BATCH, max_per_class=PER_CLASS, num_workers=workers, seed=0, **options)


def fit(
    folder: Path,
    method: str,
    *,
    stop: Signal | None = None,
    resume: Path | None = None,
    workers: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Run one fit and return how it ended."""
    net = module(method)
    last = folder / "checkpoints" / "last.ckpt"
    callbacks: list[L.Callback] = checkpoints(folder / "checkpoints", select=True)
    images = data(workers, augmentation=AUGMENTATION, sampling="balanced") if method == "recipe" else data(workers)
    if method != "recipe":  # which brings its own
        callbacks += [EarlyStopping("val/acc", mode="max", patience=50), EMAWeightAveraging(decay=0.9)]
    callbacks += [StopSafely(last, advice="resume it"), *([stop] if stop else [])]
    quiet = {
        "logger": False,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    single = {"accelerator": "cpu", "devices": 1, "max_epochs": EPOCHS, "num_sanity_val_steps": 0}
    trainer = L.Trainer(callbacks=callbacks, plugins=[WholeCheckpoints()], **{**quiet, **single, **options})
    code = 0
    try:
        trainer.fit(net, images, ckpt_path=str(resume) if resume else None)
    except RunStoppedError as end:
        code = end.code
    (early,) = trainer.early_stopping_callbacks
    return {
        "code": code,
        "steps": trainer.global_step,
        "state": state(net),
        "best": [each.best_model_score for each in trainer.checkpoint_callbacks if hasattr(each, "best_model_score")],
        "early": float(early.best_score),
        "waited": early.wait_count,
        "lr": [group["lr"] for group in trainer.optimizers[0].param_groups] if trainer.optimizers else [],
    }


def main(folder: Path, step: int, method: str) -> None:
    """Run two processes, of which one gets the signal; rank 0 saves how both ended."""
    two = {"devices": 2, "strategy": "ddp"}
    whole = fit(folder / "whole", method, **two)
    stopped = fit(folder / "stopped", method, stop=Signal(step, signal.SIGTERM, rank=1), **two)
    again = fit(folder / "stopped", method, resume=folder / "stopped" / "checkpoints" / "last.ckpt", **two)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        torch.save({"whole": whole, "stopped": stopped, "again": again}, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
