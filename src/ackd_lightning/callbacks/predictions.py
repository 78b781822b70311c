"""``predictions.csv`` of ``ackd predict``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter

from ackd_lightning.runs.files import whole_file


class PredictionFile(BasePredictionWriter):
    """Write one line of CSV for each image, in the order of the images, for any number of processes.

    Args:
        path: File to write.
    """

    COLUMNS = ("index", "target", "prediction", "probability")

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Write index, target, prediction and probability; the first process writes for all."""
        rows = [
            row for batch in predictions for row in zip(*(batch[key].tolist() for key in self.COLUMNS), strict=True)
        ]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.gather_object(rows, parts if trainer.is_global_zero else None)
            if not trainer.is_global_zero:
                return
            rows = sorted(row for part in parts for row in part)
        with whole_file(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(self.COLUMNS)
            writer.writerows(rows)
        print(f"predictions: {self.path}")
