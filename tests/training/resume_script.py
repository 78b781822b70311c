"""Fits that are stopped and go on; imported by test_stopping.py, and started by it for two processes."""

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
from ackd_lightning import ACKDModule, AdversarialModule, DigitsDataModule, DistillationModule
from ackd_lightning.callbacks.checkpoints import WholeCheckpoints, checkpoints
from ackd_lightning.callbacks.stopping import StopSafely
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import RunStoppedError
from ackd_lightning.methods import ACKD, ACN, AIKD, ATSC, CRD, ONE
from ackd_lightning.models.zoo import create_model
from training.helpers import state

EPOCHS, BATCH, PER_CLASS = 3, 16, 8  # 5 steps an epoch


class Signal(L.Callback):
    """Sends this process a signal inside a step, or inside validation."""

    def __init__(self, step: int, number: int, *, validating: bool = False, rank: int = 0) -> None:
        self.step, self.number, self.validating, self.rank = step, number, validating, rank
        self.sent = False

    def _send(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """In an adversarial step the first of these is the discriminators', before the learners' step."""
        if not self.validating:
            self._send(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.validating and not trainer.sanity_checking:
            self._send(trainer)


class Noisy(torch.nn.Module):
    """A classifier behind dropout."""

    def __init__(self, classifier: torch.nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, embedding: Tensor) -> Tensor:
        return self.classifier(torch.nn.functional.dropout(embedding, 0.3, self.training))


def network() -> torch.nn.Module:
    net = create_model("resnet8", 10)
    net.fc = Noisy(net.fc)  # keyed noise has to be the same after a stop
    return net


def module(method: str) -> DistillationModule:
    torch.manual_seed(0)
    teacher = create_model("resnet8", 10)
    options: dict[str, Any] = {"lr": 0.05, "milestones": [1, 2], "teacher_gate": "off", "input_size": 16, "seed": 0}
    options |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    if method == "ackd":
        return ACKDModule(network(), 10, teacher=teacher, method=ACKD(discriminator_lr=0.05), **options)
    games = {
        "atsc": ATSC(classifier_lr=0.05),
        "aikd": AIKD(discriminator_lr=1e-2),
        "aikd_table": AIKD(previous="table", discriminator_lr=1e-2),
        "acn": ACN(warmup_epochs=1, generator_width=4),
    }
    if method in games:
        return AdversarialModule(network(), 10, teacher=teacher, method=games[method], **options)
    if method == "crd":
        return DistillationModule(network(), 10, teacher=teacher, method=CRD(negatives=32), **options)
    return DistillationModule(network(), 10, method=ONE(ramp_epochs=2), **options)


def data(workers: int = 0) -> ImageDataModule:
    return DigitsDataModule(batch_size=BATCH, max_per_class=PER_CLASS, num_workers=workers, seed=0)


def fit(
    folder: Path,
    method: str,
    *,
    stop: Signal | None = None,
    resume: Path | None = None,
    workers: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """One fit; the result tells how it ended."""
    net = module(method)
    early = EarlyStopping("val/acc", mode="max", patience=50)
    average = EMAWeightAveraging(decay=0.9)
    last = folder / "checkpoints" / "last.ckpt"
    callbacks: list[L.Callback] = [early, average, *checkpoints(folder / "checkpoints", select=True)]
    callbacks += [StopSafely(last, advice="go on"), *([stop] if stop else [])]
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
        trainer.fit(net, data(workers), ckpt_path=str(resume) if resume else None)
    except RunStoppedError as end:
        code = end.code
    return {
        "code": code,
        "steps": trainer.global_step,
        "state": state(net),
        "best": [each.best_model_score for each in trainer.checkpoint_callbacks if hasattr(each, "best_model_score")],
        "early": float(early.best_score),
        "lr": [group["lr"] for group in trainer.optimizers[0].param_groups] if trainer.optimizers else [],
    }


def main(folder: Path, step: int) -> None:
    """Two processes, of which one gets the signal; rank 0 leaves how both ended."""
    two = {"devices": 2, "strategy": "ddp"}
    whole = fit(folder / "whole", "ackd", **two)
    stopped = fit(folder / "stopped", "ackd", stop=Signal(step, signal.SIGTERM, rank=1), **two)
    again = fit(folder / "stopped", "ackd", resume=folder / "stopped" / "checkpoints" / "last.ckpt", **two)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        torch.save({"whole": whole, "stopped": stopped, "again": again}, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
