"""Room on the disk for the files of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from ackd_lightning.callbacks.health import checkpoint_bytes, is_dry


class DiskRoom(L.Callback):
    """Warn at the start when the checkpoints that a run keeps will not fit on the disk.

    Args:
        folder: of the run.
        copies: of the student's weights that are written at the end.
    """

    def __init__(self, folder: Path, *, copies: int = 1) -> None:
        self.folder, self.copies = folder, copies

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimate, compare, say."""
        if not trainer.is_global_zero or is_dry(trainer):
            return
        size = checkpoint_bytes(pl_module, trainer.optimizers)
        kept = sum(
            self._kept(each, trainer) for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)
        )
        there = sum(path.stat().st_size for path in self.folder.glob("checkpoints/*.ckpt"))
        student = sum(each.numel() * each.element_size() for each in cast("Any", pl_module).student.parameters())
        # one more checkpoint, as the new one is written before the old one goes
        needed = max(size * (kept + 1) - there, size) + self.copies * student
        existing = next(each for each in (self.folder, *self.folder.absolute().parents) if each.is_dir())
        free = shutil.disk_usage(existing).free
        if needed > free:
            rank_zero_warn(
                f"{self.folder} needs about {needed / 1e6:,.0f} MB for {kept} checkpoints of {size / 1e6:,.0f} MB and "
                f"one being written, and the disk has {free / 1e6:,.0f} MB left; make room, or set --runs_dir"
            )

    @staticmethod
    def _kept(saver: ModelCheckpoint, trainer: L.Trainer) -> int:
        """Files that a callback leaves; all of a run's epochs when it removes none."""
        if saver.save_top_k >= 0:
            return saver.save_top_k + bool(saver.save_last)
        epochs = max((trainer.max_epochs or 1) - trainer.current_epoch, 1)
        steps = max(int(trainer.estimated_stepping_batches) - trainer.global_step, 1)
        every = getattr(saver, "_every_n_train_steps", 0)
        return -(-steps // every) if every else -(-epochs // max(getattr(saver, "_every_n_epochs", 1), 1))
