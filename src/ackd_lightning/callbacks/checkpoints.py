"""Checkpoints of a run, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    pass


import contextlib
import io
import os
import secrets

from lightning.pytorch.plugins.io import TorchCheckpointIO


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint of a run whose folder may have been moved: the best so far is known there, too."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint says of earlier ones, with their new places; not when they stayed elsewhere."""
        old, new = str(state_dict["dirpath"]), str(self.dirpath)

        def moved(value: Any) -> Any:
            return value.replace(old, new, 1) if isinstance(value, str) else value

        if not Path(moved(state_dict["best_model_path"])).is_file():
            super().load_state_dict(state_dict)
            return
        kept = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**{key: moved(each) for key, each in state_dict.items()}, "best_k_models": kept})


def checkpoints(folder: Path, *, select: bool) -> list[ModelCheckpoint]:
    """Checkpoints of a run: the last epoch, and the one with the best validation accuracy.

    Args:
        folder: of the checkpoints.
        select: False when the run looks at test data, on which nothing may be selected: then only the last is kept.
    """
    last = RunCheckpoint(
        folder, filename="last", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
    )
    if not select:
        return [last]
    best = RunCheckpoint(
        folder, filename="best", monitor="val/acc", mode="max", save_top_k=1, enable_version_counter=False
    )
    return [last, best]


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint under a hidden name, waits until it is on the disk, and then gives it its name.

    A killed process or a full disk leaves the checkpoint that was there before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write.

        Args:
            checkpoint: plain data and tensors.
            path: of the file; missing folders are made.
            storage_options: not used, None.

        Raises:
            OSError: when it cannot be written, with a sentence that names the file and what is left.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as stream:
                stream.write(buffer.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            left = f"the one before it is still there ({target})" if target.is_file() else "none was written before"
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"checkpoint {target} could not be written ({reason}) and {left}; make room and go on"
            ) from error
