"""The whole contract between data, networks, methods and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError


class Batch(NamedTuple):
    """One batch as networks and methods see it.

    Attributes:
        image: ``B x C x H x W`` float, augmented and normalised, on the training device.
        target: ``B`` int64 class indices.
        index: ``B`` int64 positions in the training set (stable over epochs), -1 when unknown.
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose


@dataclass(frozen=True, slots=True)
class NetOutput:
    """What one forward pass of a network hands to a method.

    Attributes:
        logits: ``B x K`` class scores before softmax.
        features: ``F_0 .. F_S``: output of the stem, then of each stage. The last one is the map that global
            pooling sees (so it includes a final BatchNorm and ReLU where the architecture has them).
        embedding: ``B x D`` pooled last feature, the input of the classifier.
        branches: one output per auxiliary learner; its ``features`` holds its last feature map only.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    embedding: Tensor
    branches: tuple[NetOutput, ...] = ()


@dataclass(frozen=True, slots=True)
class NetSpec:
    """Shapes of a [`NetOutput`][] for one image, known before anything is trained.

    Attributes:
        num_classes: K.
        features: ``(C, H, W)`` of each entry of `NetOutput.features`.
        embedding: D.
        branches: the auxiliary learners' shapes.
    """

    num_classes: int
    features: tuple[tuple[int, int, int], ...]
    embedding: int
    branches: tuple[NetSpec, ...] = ()


def read_batch(batch: Any, input_size: int) -> Batch:
    """Read ``(image, target)`` or ``(image, target, index)``.

    Args:
        batch: from any data module.
        input_size: side in pixels that the images must have.

    Raises:
        ACKDError: when it is neither, or the images have another size.
    """
    if isinstance(batch, Batch):
        result = batch
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        image, target = batch[0], batch[1]
        result = Batch(image, target, batch[2] if len(batch) == 3 else torch.full_like(target, -1))
    else:
        raise ACKDError(f"a batch is {type(batch).__name__}; the data must give (image, target) or add an index")
    height, width = result.image.shape[-2:]
    if (height, width) != (input_size, input_size):
        raise ACKDError(
            f"images are {height} x {width} and input_size is {input_size}; set input_size to the side of your images"
        )
    return result
