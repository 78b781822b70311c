"""Predictions for every test image, kept in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor

from ackd_lightning.callbacks.health import is_fast_dev_run
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.loaders import data_of
from ackd_lightning.data.webdataset import WebDatasetDataModule
from ackd_lightning.runs.answers import Answers, answers_file, hash_of_images, write_answers

_KEYS = ("index", "target", "prediction", "probability")


class TestAnswers(L.Callback):
    """Keep the prediction for every test image, so that two runs can be compared image by image.

    A test keeps them in ``answers`` until `write` is called. A fit that validates on the test set writes those of its
    last epoch.

    Args:
        folder: Folder of the run; None for a test, which calls `write`.

    Attributes:
        answers: Predictions of the last test, on the first process; None before one, and where images cannot be
            identified.
    """

    __test__ = False  # the name is not that of a test

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.answers: Answers | None = None
        self._measured_at = -1
        self._batches: list[dict[str, Tensor]] = []

    def _add(self, outputs: Any, dataloader_idx: int) -> None:
        if dataloader_idx == 0 and isinstance(outputs, dict):
            self._batches.append({key: outputs[key].detach() for key in _KEYS})

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches, self._batches, self.answers = self._batches, [], None
        found = {key: torch.cat([each[key] for each in batches]).cpu() for key in _KEYS} if batches else {}
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.gather_object(found, parts if trainer.is_global_zero else None)
            if not trainer.is_global_zero:
                return
            found = {key: torch.cat([each[key] for each in parts if each]) for key in _KEYS} if any(parts) else {}
        if not found:
            return
        index = found["index"]
        known = bool((index >= 0).all()) and len(set(index.tolist())) == len(index)
        if known:
            found = {key: each[index.argsort()] for key, each in found.items()}
        data = data_of(trainer)
        streamed = isinstance(data, WebDatasetDataModule)
        if not known and (streamed or trainer.world_size > 1):
            return  # in no known order
        names = data.image_names("test") if isinstance(data, ImageDataModule) and known else None
        rows = found["index"].tolist()
        if streamed:  # rows are numbers by name
            names = [str(row) for row in rows]
        elif names is not None:
            names = [names[row] for row in rows]
        classes = getattr(getattr(pl_module, "data", None), "class_names", None) or getattr(data, "class_names", None)
        images = hash_of_images(found["target"], classes, names)
        self.answers = Answers(found["target"], found["prediction"], found["probability"], images, type(data).__name__)

    def write(self, run: Path, which: str) -> None:
        """Write the answers of the last test; nothing on other processes than the first.

        Args:
            run: Folder of the run.
            which: Stem of the checkpoint that was tested.
        """
        if self.answers is not None:
            write_answers(self.answers, answers_file(run, which))

    # ---------------------------------------------------------------- test

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin again."""
        self._batches = []

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the module predicted."""
        self._add(outputs, dataloader_idx)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the images in order."""
        self._end(trainer, pl_module)

    # ---------------------------------------------------------------- validation on the test set

    def _looks(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        reads_test = cast("Any", pl_module).looks_at_test()
        return bool(self.folder and reads_test and not trainer.sanity_checking and not is_fast_dev_run(trainer))

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin again."""
        self._batches = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the module predicted, if validation reads the test set."""
        if self._looks(trainer, pl_module):
            self._add(outputs, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the images in order."""
        if self._looks(trainer, pl_module):
            self._end(trainer, pl_module)
            self._measured_at = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the answers of the last epoch, if its weights gave them."""
        if self.folder is not None and self._measured_at == trainer.global_step:
            self.write(self.folder, "last")
