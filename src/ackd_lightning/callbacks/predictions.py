"""The table of ``ackd predict`` for the test part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch.distributed as dist
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.loaders import data_of
from ackd_lightning.runs.tables import write_table


class PredictionFile(BasePredictionWriter):
    """Write one row for each image, in the order of the images, for any number of processes.

    The columns are the position of the image in its part, its file, its class index (-1 without a label), the index
    and the name of the predicted class, and the probability of that class. File and name are empty where the data have
    none.

    Args:
        path: CSV or Parquet file to write, by its ending.
    """

    COLUMNS = ("index", "file", "target", "prediction", "class_name", "probability")
    _PREDICTED = ("index", "target", "prediction", "probability")

    def __init__(self, path: Path) -> None:
        super().__init__(write_interval="epoch")
        self.path = path

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        """Write the predictions; the first process writes for all."""
        batches = [
            batch for each in predictions for batch in (each if isinstance(each, list) else [each])
        ]  # a list for each of several loaders
        rows = [row for batch in batches for row in zip(*(batch[key].tolist() for key in self._PREDICTED), strict=True)]
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            dist.gather_object(_placed(rows, batch_indices), parts if trainer.is_global_zero else None)
            if not trainer.is_global_zero:
                return
            placed = [each for part in parts for each in part]
            if len({place for place, _ in placed}) == len(placed):
                placed.sort()
            else:
                rank_zero_warn(
                    "the images have no index, so that their order is unknown to several processes: the rows are those "
                    "of the first process, then those of the next"
                )
            rows = [row for _, row in placed]
        data = data_of(trainer)
        files = data.image_names("test") if isinstance(data, ImageDataModule) else None
        classes = getattr(getattr(pl_module, "data", None), "class_names", None)
        table = [
            (
                index,
                files[index] if files and index >= 0 else "",
                target,
                prediction,
                classes[prediction] if classes else "",
                probability,
            )
            for index, target, prediction, probability in rows
        ]
        write_table({name: [row[at] for row in table] for at, name in enumerate(self.COLUMNS)}, self.path)
        print(f"predictions: {self.path}")


def _placed(rows: list[tuple[Any, ...]], batch_indices: Any) -> list[tuple[tuple[int, int], tuple[Any, ...]]]:
    """Rows with their places: the number of the loader with Lightning's index, or else the data's own index."""
    places = [
        (number, index)
        for number, batches in enumerate(batch_indices or ())
        for indices in batches or ()
        for index in indices or ()
    ]
    if len(places) != len(rows):
        places = [(0, row[0]) for row in rows]
    return list(zip(places, rows, strict=True))
