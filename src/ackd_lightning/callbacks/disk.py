"""Space on the disk for the files of a run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from ackd_lightning.callbacks.health import is_fast_dev_run

if TYPE_CHECKING:
    from ackd_lightning.callbacks.protocol import TrainingModule


def checkpoint_bytes(module: L.LightningModule, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Estimate the size of a checkpoint: the weights, and the optimizers' state of each parameter.

    Args:
        module: Module whose state dict is written.
        optimizers: Its optimizers. SGD with momentum keeps one number for each parameter, Adam two, plain SGD none.
    """
    size = sum(each.numel() * each.element_size() for each in module.state_dict().values() if torch.is_tensor(each))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            numbers = 2 if "betas" in group else int(bool(group.get("momentum")))
            size += numbers * sum(each.numel() * each.element_size() for each in group["params"])
    return size


class DiskSpaceCheck(L.Callback):
    """Warn at the start if the checkpoints that a run keeps will not fit on the disk.

    Args:
        folder: Folder of the run.
        copies: Number of files with the student's weights that are written at the end.
    """

    def __init__(self, folder: Path, *, copies: int = 1) -> None:
        self.folder, self.copies = folder, copies

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimate the space that the run needs, and warn if the disk has less."""
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        size = checkpoint_bytes(pl_module, trainer.optimizers)
        kept = sum(
            self._kept(each, trainer) for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)
        )
        present = sum(path.stat().st_size for path in self.folder.glob("checkpoints/*.ckpt"))
        student = cast("TrainingModule", pl_module).student
        weights = sum(each.numel() * each.element_size() for each in student.parameters())
        # one more checkpoint, as the new one is written before the old one is removed
        needed = max(size * (kept + 1) - present, size) + self.copies * weights
        existing = next(each for each in (self.folder, *self.folder.absolute().parents) if each.is_dir())
        free = shutil.disk_usage(existing).free
        if needed > free:
            rank_zero_warn(
                f"{self.folder} needs about {needed / 1e6:,.0f} MB for {kept} checkpoints of {size / 1e6:,.0f} MB and "
                f"one being written, and the disk has {free / 1e6:,.0f} MB left; free disk space, or set --runs_dir"
            )

    @staticmethod
    def _kept(saver: ModelCheckpoint, trainer: L.Trainer) -> int:
        """Count the files that a checkpoint callback leaves; all that it writes if it removes none."""
        if saver.save_top_k >= 0:
            return saver.save_top_k + bool(saver.save_last)
        epochs = max((trainer.max_epochs or 1) - trainer.current_epoch, 1)
        steps = max(int(trainer.estimated_stepping_batches) - trainer.global_step, 1)
        every = getattr(saver, "_every_n_train_steps", 0)
        return -(-steps // every) if every else -(-epochs // max(getattr(saver, "_every_n_epochs", 1), 1))
