"""The whole contract between data, networks, methods and training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


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
