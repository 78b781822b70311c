"""One line of output for each epoch, for terminals and logs without a progress bar."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as L

if TYPE_CHECKING:
    from ackd_lightning.callbacks.protocol import TrainingModule


class EpochLine(L.Callback):
    """Print loss, accuracy and the time left after each epoch."""

    def __init__(self) -> None:
        self.started = 0.0
        self.first = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.started, self.first = time.monotonic(), trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        unlogged = cast("TrainingModule", pl_module).means.compute()  # of every process, so before the return
        if not trainer.is_global_zero:
            return
        values = {**trainer.callback_metrics, **unlogged}
        done = trainer.current_epoch - self.first + 1
        elapsed = time.monotonic() - self.started
        total = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None
        parts = [f"epoch {trainer.current_epoch + 1}" + (f"/{total}" if total else "")]
        if "train/loss" in values:
            parts.append(f"loss {float(values['train/loss']):.3f}")
        for stage in ("val", "test"):
            for network in ("", "ensemble_"):
                if f"{stage}/{network}acc" in values:
                    label = f"{stage} {network.rstrip('_') + ' ' if network else ''}acc"
                    parts.append(f"{label} {float(values[f'{stage}/{network}acc']):.2%}")
        parts.append(f"{elapsed / done:.1f} s/epoch")
        if total:
            left = (total - trainer.current_epoch - 1) * elapsed / done
            parts.append(f"{left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f} left")
        print("  ".join(parts), flush=True)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; a program without a console has None, or a stream that is closed.

    Args:
        stream: ``sys.stdout`` or ``sys.stderr``.
    """
    return stream is not None and not stream.closed and bool(stream.isatty())
