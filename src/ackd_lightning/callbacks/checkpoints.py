"""Checkpoints of a run, each written whole or not at all."""

from __future__ import annotations

import io
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ackd_lightning.errors import NotWrittenError
from ackd_lightning.writing import whole_file


class RunCheckpoint(ModelCheckpoint):
    """Checkpoint callback that still knows its best checkpoint after the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, with the new place of earlier checkpoints if they were moved with the folder."""
        old, new = str(state_dict["dirpath"]), str(self.dirpath)

        def moved(value: Any) -> Any:
            return value.replace(old, new, 1) if isinstance(value, str) else value

        if not Path(moved(state_dict["best_model_path"])).is_file():
            if old == new:  # else this run goes on from another one, whose checkpoints stay that run's
                super().load_state_dict(state_dict)
            return
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**{key: moved(each) for key, each in state_dict.items()}, "best_k_models": best})


def checkpoints(folder: Path, *, select: bool) -> list[ModelCheckpoint]:
    """Return the checkpoint callbacks of a run: the last epoch, and the one with the best validation accuracy.

    Args:
        folder: Folder of the checkpoints.
        select: Whether to keep the best epoch, too. False for a run that is evaluated on test data, on which nothing
            may be selected.
    """
    last = RunCheckpoint(
        folder, filename="last", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
    )
    if not select:
        return [last]
    best = RunCheckpoint(
        folder, filename="best", monitor="val/acc", mode="max", save_top_k=1, enable_version_counter=False
    )
    return [best, last]  # in this order the last checkpoint holds what is the best one by then


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoint plugin that writes a file whole or not at all.

    A killed process or a full disk leaves the checkpoint that was there before.

    Attributes:
        before_replacing: Called once when the next file is complete and about to replace the earlier one.
    """

    before_replacing: Callable[[], None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: Plain data and tensors.
            path: File to write. Missing folders are made.
            storage_options: Not used; None.

        Raises:
            NotWrittenError: Naming the file and the checkpoint that is left.
        """
        target = Path(path)
        buffer = io.BytesIO()  # torch's own writer does not raise OSError
        torch.save(checkpoint, buffer)
        try:
            with (
                whole_file(target, before=self.before_replacing) as partial,
                buffer.getbuffer() as view,
                partial.open("wb") as file,
            ):
                file.write(view)
            self.before_replacing = None
        except OSError as error:
            kept = sorted(each.name for each in target.parent.glob("*.ckpt"))
            left = f"{' and '.join(kept)} of before are kept" if kept else "there is none of before"
            then = f"`ackd fit --resume {shlex.quote(str(target.parents[1]))}`" if kept else "start the run again"
            reason = error.strerror or str(error)
            raise NotWrittenError(
                f"checkpoint {target} could not be written ({reason}), and {left}; free disk space, then {then}"
            ) from error
