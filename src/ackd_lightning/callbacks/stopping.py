"""Stopping and writing without loss: signals wait for a safe place, checkpoints appear whole or not at all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from ackd_lightning.errors import RunStoppedError

Handler = Callable[[int, FrameType | None], Any] | int | None
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1


class StopSafely(Checkpoint):
    """Ctrl-C, SIGTERM and SIGUSR1 end a fit behind a whole training step or epoch, with a checkpoint.

    Never between a discriminator step and its learner step, and never inside validation: a run that goes on from the
    checkpoint ends with the weights of an uninterrupted one. All processes stop behind the same step, also when only
    one of them got the signal. A second Ctrl-C ends the run at once, without a checkpoint.

    Args:
        checkpoint: the file to write.
        advice: how to go on, for the last line.
    """

    def __init__(self, checkpoint: Path, *, advice: str) -> None:
        self.checkpoint, self.advice = checkpoint, advice
        self.received = 0
        self.before: dict[int, Handler] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals from Lightning, whose handlers write and communicate in the middle of a step."""
        if trainer.is_global_zero:  # what a killed writer left
            for partial in self.checkpoint.parent.glob(".*.ckpt.*.tmp"):
                partial.unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            self.received = number
            if number == signal.SIGINT:
                os.write(2, b"\nstopping behind this step, with a checkpoint; Ctrl-C again stops at once\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop behind a step; where validation or the end of the epoch follows, later."""
        validation_follows = trainer.is_last_batch or (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0  # gradients are in no checkpoint
        if not validation_follows and not accumulating:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop behind an epoch."""
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        number = self.received
        if trainer.world_size > 1:
            asked = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if not number:
            return
        trainer.save_checkpoint(self.checkpoint)
        place = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step:,}"
        raise RunStoppedError(number, f"received; stopped in {place}, kept in {self.checkpoint}; {self.advice}")
