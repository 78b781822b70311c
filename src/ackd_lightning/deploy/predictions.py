"""Predictions of a trained network for images without labels, and the columns of their table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ackd_lightning.deploy.images import Listed, Notes, read_batches
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.errors import ACKDError


@dataclass(frozen=True)
class Predictions:
    """Most probable classes of N images.

    Attributes:
        files: Name of each image.
        rows: ``N`` positions of the images among those that were listed.
        classes: ``N x T`` int64 class indices, the most probable first.
        probabilities: ``N x T`` float32.
    """

    files: tuple[str, ...]
    rows: Tensor
    classes: Tensor
    probabilities: Tensor

    def columns(self, names: Sequence[str] | None) -> dict[str, list[Any]]:
        """Return the columns of the table, named as in ``predictions.csv`` of a test part, without its targets.

        ``prediction``, ``class_name`` and ``probability`` come once for each class of the top T: ``prediction_2``, …

        Args:
            names: Names of the classes; None when unknown, which leaves their cells empty.
        """
        found: dict[str, list[Any]] = {
            "index": self.rows.tolist(),
            "file": list(self.files),
        }
        for rank in range(self.classes.shape[1]):
            suffix = f"_{rank + 1}" if rank else ""
            chosen = self.classes[:, rank].tolist()
            found[f"prediction{suffix}"] = chosen
            found[f"class_name{suffix}"] = [names[each] if names else "" for each in chosen]
            found[f"probability{suffix}"] = self.probabilities[:, rank].tolist()
        return found


def predict_images(
    logits: Callable[[Tensor], Tensor],
    images: Sequence[Listed],
    preprocessing: Preprocessing,
    notes: Notes,
    *,
    top: int = 1,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda count: None,
) -> Predictions:
    """Predict image files.

    Args:
        logits: Function from normalised images ``B x C x H x W`` to ``B x K``.
        images: Image files.
        preprocessing: How they are brought to the network's input.
        notes: Where conversions and unreadable files are noted.
        top: Number T of classes for each image; at most K.
        batch_size: Number of images of a batch.
        workers: Number of worker processes; None chooses it.
        device: Device on which images are normalised and predicted.
        progress: Function that is called with the number of images after each batch.

    Raises:
        ACKDError: If no image can be read.
    """
    rows, classes, probabilities = [], [], []
    for batch, pixels, count in read_batches(images, preprocessing, notes, batch_size=batch_size, workers=workers):
        if len(batch):
            scores = logits(preprocessing.normalised(pixels.to(device))).float().softmax(dim=1)
            best = scores.topk(min(top, scores.shape[1]), dim=1)
            rows.append(batch)
            classes.append(best.indices.cpu())
            probabilities.append(best.values.cpu())
        progress(count)
    if not rows:
        name, problem = notes.unreadable[0]
        raise ACKDError(f"none of the {len(images):,} images can be read, the first is {name}: {problem}")
    order = torch.cat(rows)
    files = tuple(images[row].name for row in order.tolist())
    return Predictions(files, order, torch.cat(classes), torch.cat(probabilities))
