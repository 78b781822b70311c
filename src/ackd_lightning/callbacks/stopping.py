"""Stop a fit without loss after a signal, or early when the validation accuracy no longer grows."""

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
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, Timer

from ackd_lightning.errors import RunStoppedError, count_of

Handler = Callable[[int, FrameType | None], Any] | int | None
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)  # Windows has neither of the last two
HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # a terminal closes


class StopSafely(Checkpoint):
    """Stop a fit on a signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) after a whole step or epoch, and save a checkpoint.

    A fit never stops between an auxiliary optimizer's step and the student's step, and never during validation: a run
    that is resumed from the checkpoint ends with the weights of an uninterrupted one. All processes stop after the
    same step, even if only one of them got the signal. A second Ctrl-C ends the run at once, without a checkpoint.
    SIGHUP that is ignored, as after ``nohup``, stays so.

    Args:
        checkpoint: File to write.
        advice: How to resume the run, for the last line of output.
    """

    def __init__(self, checkpoint: Path, *, advice: str) -> None:
        self.checkpoint, self.advice = checkpoint, advice
        self.received, self.process = 0, os.getpid()
        self.previous: dict[int, Handler] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace the signal handlers; Lightning's own save and communicate in the middle of a step."""
        if trainer.is_global_zero:  # files that a killed process did not finish
            for partial in self.checkpoint.parent.glob(".*.ckpt.*.tmp"):
                partial.unlink(missing_ok=True)
        self.process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(HANGUP) == signal.SIG_IGN if HANGUP else False
            taken = [number for number in SIGNALS if number != HANGUP or not ignored]
            self.previous = {number: signal.signal(number, self._remember) for number in taken}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a loader's process, which has inherited the handler and ends with ours
            return
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received:
            self.received = number
            if number == signal.SIGINT:
                os.write(2, b"\nstopping after this step and saving a checkpoint; press Ctrl-C again to quit now\n")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a step, unless validation or the end of the epoch follows, which is waited for."""
        across = trainer.check_val_every_n_epoch is None  # validations are counted across epochs
        done, every = 1 + (trainer.fit_loop.total_batch_idx if across else batch_idx), trainer.val_check_batch
        validation_follows = trainer.is_last_batch or (every is not None and done % every == 0)
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0  # no checkpoint has gradients
        if not validation_follows and not accumulating:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop after an epoch, whose means are logged first, as Lightning does after this hook."""
        self._stop_if_asked(trainer, epoch_ends=True)

    def _stop_if_asked(self, trainer: L.Trainer, *, epoch_ends: bool = False) -> None:
        number = self.received
        if trainer.world_size > 1:
            asked = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if not number:
            return
        trainer.save_checkpoint(self.checkpoint)
        if epoch_ends:
            steps = trainer.fit_loop.epoch_loop
            steps._batches_that_stepped -= 1  # Lightning logs the means at the last step
            trainer._logger_connector.update_train_epoch_metrics()
            steps._batches_that_stepped += 1
        place = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step:,}"
        raise RunStoppedError(number, f"received; stopped in {place}, saved {self.checkpoint}; {self.advice}")


class WholeStepTimer(Timer):
    """End a fit after some time, and after the gradients of a step are accumulated, which no checkpoint has.

    Args:
        duration: Time as Lightning's ``max_time``.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Look at the clock where the optimizer has made a step."""
        batches = trainer.fit_loop.epoch_loop.batch_idx + 1
        if trainer.is_last_batch or batches % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_end(trainer, *args, **kwargs)


class StopEarly(EarlyStopping):
    """End a fit when ``val/acc`` has not grown for some validations, and say so.

    Args:
        patience: Number of validations without a better accuracy.
    """

    def __init__(self, patience: int) -> None:
        super().__init__("val/acc", mode="max", patience=patience, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, but for the patience, which a resumed run may raise."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train nothing more in a run that was interrupted where it would have ended."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
            self.stopped_epoch = self.stopped_epoch or max(trainer.current_epoch - 1, 0)  # less patience than before
        else:
            self.stopped_epoch = 0  # of the part before this one, which has been given more patience

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say when and why the fit ended."""
        if self.wait_count >= self.patience and trainer.is_global_zero:
            print(
                f"stopped early after epoch {self.stopped_epoch + 1}: val/acc has not grown for "
                f"{count_of(self.patience, 'validation')} (best {float(self.best_score):.2%})",
                flush=True,
            )
