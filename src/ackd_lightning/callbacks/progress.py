"""How far a fit is: one line of output for each epoch, and a progress bar on terminals."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar, Timer
from rich import get_console

from ackd_lightning.callbacks.length import epochs_of_fit

if TYPE_CHECKING:
    from ackd_lightning.callbacks.protocol import TrainingModule


_WIDE = 110
"""Columns of a terminal that the whole bar fits into."""
_NEEDED = 3
"""Description, bar and batches."""
_SHORT = 8
"""Width of the bar itself on a terminal that is narrower."""


class HasBest(Protocol):
    """What knows the metrics of the best epoch so far."""

    @property
    def best(self) -> Mapping[str, float]:
        """Metrics by name, ``val/acc`` and ``epoch`` among them; empty without validation data."""


class EpochLine(L.Callback):
    """Print loss, accuracy, the best accuracy so far and the time left for the whole run after each epoch.

    Args:
        summary: What knows the best epoch; None prints no best accuracy.
    """

    def __init__(self, summary: HasBest | None = None) -> None:
        self.summary = summary
        self.started = 0.0
        self.first = 0
        self.measured = -1  # the last epoch with a validation

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.started, self.first = time.monotonic(), trainer.current_epoch

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember which epoch was validated."""
        if not trainer.sanity_checking:
            self.measured = trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        unlogged = cast("TrainingModule", pl_module).means.compute()  # of every process, so before the return
        if not trainer.is_global_zero:
            return
        values = {**trainer.callback_metrics, **unlogged}
        done = trainer.current_epoch - self.first + 1
        elapsed = time.monotonic() - self.started
        total = epochs_of_fit(trainer)
        parts = [f"epoch {trainer.current_epoch + 1}" + (f"/{total}" if total else "")]
        if "train/loss" in values:
            parts.append(f"loss {float(values['train/loss']):.3f}")
        for stage in ("val", "test") if self.measured == trainer.current_epoch else ():
            for network in ("", "ensemble_"):
                if f"{stage}/{network}acc" in values:
                    label = f"{stage} {network.rstrip('_') + ' ' if network else ''}acc"
                    parts.append(f"{label} {float(values[f'{stage}/{network}acc']):.2%}")
        if best := _best(self.summary):
            parts.append(f"best {best}")
        parts.append(f"{elapsed / done:.1f} s/epoch")
        if total:
            parts.append(f"{clock(_at_most(trainer, (total - trainer.current_epoch - 1) * elapsed / done))} left")
        print("  ".join(parts), flush=True)


class RunBar(RichProgressBar):
    """Progress bar of an epoch, with the accuracies so far and the time left for the whole run.

    Args:
        summary: What knows the best epoch.
    """

    def __init__(self, summary: HasBest) -> None:
        super().__init__()
        self.summary = summary
        self.started: tuple[float, float] | None = None  # on the clock, and in epochs

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock of an earlier fit."""
        super().on_train_start(trainer, pl_module)
        self.started = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock with the first batch; a resumed loop counts those of its checkpoint until then."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.started is None:
            self.started = time.monotonic(), _epochs_done(trainer, running=1)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """Return what stands beside the bar."""
        values: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        values.pop("v_num", None)
        shown: dict[str, Any] = {}
        if (loss := values.pop("train/loss_step", None)) is not None:
            shown["loss"] = f"{loss:.3f}"
        for name in ("val/acc", "test/acc"):
            if (accuracy := values.pop(name, None)) is not None:
                best = self.summary.best.get("val/acc") if get_console().width >= _WIDE else None
                shown[name] = f"{accuracy:.2%}" + (f" (best {best:.2%})" if best is not None else "")
        if (left := self._left(trainer)) is not None:
            shown["left"] = clock(left)
        return {**shown, **values}

    def _left(self, trainer: L.Trainer) -> float | None:
        """Seconds that the run still takes at the pace so far; None while that is not known."""
        total = epochs_of_fit(trainer)
        if self.started is None or total is None or not trainer.training:
            return None
        since, first = self.started
        now = _epochs_done(trainer)
        pace = (time.monotonic() - since) / (now - first) if now > first else None
        return None if pace is None else _at_most(trainer, (total - now) * pace)

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Leave out the time and the speed of an epoch where they would break the line."""
        columns = list(super().configure_columns(trainer))
        if get_console().width >= _WIDE:
            return columns
        columns[1].bar_width = _SHORT
        return columns[:_NEEDED]

    def _get_train_description(self, current_epoch: int) -> str:
        """Count epochs from 1, as everywhere else."""
        total = epochs_of_fit(self.trainer)
        text = f"epoch {current_epoch + 1}" + (f"/{total}" if total else "")
        return text.ljust(len(self.validation_description))


def _at_most(trainer: L.Trainer, seconds: float) -> float:
    """Return the seconds that a fit still takes, or the rest of its ``max_time`` if that is less."""
    timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
    rest = [each.time_remaining() for each in timers]
    return max(0.0, min([seconds, *(each for each in rest if each is not None)]))


def _epochs_done(trainer: L.Trainer, running: int = 0) -> float:
    steps = trainer.num_training_batches
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready - running
    whole = isinstance(steps, int) and steps > 0
    return trainer.current_epoch + (min(ready / steps, 1.0) if whole else 0.0)


def _best(summary: HasBest | None) -> str:
    best = {} if summary is None else summary.best
    return f"{best['val/acc']:.2%} (epoch {best['epoch']:.0f})" if "val/acc" in best else ""


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds.

    Args:
        seconds: Duration.

    Example:
        >>> clock(3725)
        '1:02:05'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; a program without a console has None, or a stream that is closed.

    Args:
        stream: ``sys.stdout`` or ``sys.stderr``.
    """
    return stream is not None and not stream.closed and bool(stream.isatty())
