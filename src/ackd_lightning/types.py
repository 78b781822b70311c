"""Plain types that data, networks, methods and training exchange: `Batch`, `NetOutput`, `NetSpec`, `DataInfo`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.plain import as_plain

ImageSize = int | tuple[int, int]
"""Side of square images in pixels, or their height and width."""

_LARGEST = 1.5
"""Largest mean or standard deviation that is taken to be of pixels from 0 to 1."""


def height_width(size: ImageSize) -> tuple[int, int]:
    """Return height and width in pixels.

    Args:
        size: Side of square images, or height and width.

    Examples:
        >>> height_width(32), height_width((48, 64))
        ((32, 32), (48, 64))
    """
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def check_scale(mean: Sequence[float] | None, std: Sequence[float] | None, place: str = "") -> None:
    """Refuse mean and standard deviation of pixels from 0 to 255.

    Args:
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        place: Where they were given, such as ``" in DataInfo"``.

    Raises:
        ACKDError: If one is larger than pixels from 0 to 1 can have.
    """
    for name, values, them in (("mean", mean, "mean and std"), ("std", std, "it")):
        if values and max(values) > _LARGEST:
            raise ACKDError(
                f"{name} is {tuple(values)}{place} and must be of pixels from 0 to 1; divide {them} by 255 "
                f"({', '.join(f'{each / 255:.4g}' for each in values)})"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _refused(name: str, value: object, kind: str) -> ACKDError:
    return ACKDError(f"{name} is {value} in DataInfo; it must be {kind}")


class Batch(NamedTuple):
    """One batch as networks and methods see it.

    Attributes:
        image: ``B x C x H x W`` float, augmented and normalised, on the training device.
        target: ``B`` int64 class indices.
        index: ``B`` int64 positions in the training set (stable over epochs), -1 when unknown.
        soft: ``B x K`` float32 labels that are not one class each; None when ``target`` says all. In the images of a
            data module they are the shares of the classes in a mixed image, of which ``target`` has the largest. In a
            training step they are smoothed and weighted by class, too, as the cross-entropy reads them.
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    soft: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """Labels that a cross-entropy learns from: ``soft``, or ``target`` without it."""
        return self.target if self.soft is None else self.soft


@dataclass(frozen=True, slots=True)
class NetOutput:
    """Output of one forward pass of a network.

    Attributes:
        logits: ``B x K`` class scores before the softmax.
        features: ``F_0 .. F_S``: output of the stem and of each stage, each ``B x C x H x W``. The last one is the map
            that global pooling reads, after a final BatchNorm and ReLU where the architecture has them. None for a
            network whose stages are unknown.
        embedding: ``B x D`` pooled last feature map, the input of the classifier; None where it is unknown.
        branches: One output per auxiliary learner; its ``features`` holds its last feature map alone.
    """

    logits: Tensor
    features: tuple[Tensor, ...] | None = None
    embedding: Tensor | None = None
    branches: tuple[NetOutput, ...] = ()


@dataclass(frozen=True, slots=True)
class NetSpec:
    """Shapes of a `NetOutput` for one image, known before training.

    Attributes:
        num_classes: K.
        features: ``(C, H, W)`` of each entry of `NetOutput.features`; None for a network whose stages are unknown.
        embedding: D; None where it is unknown.
        branches: Shapes of the auxiliary learners.
        pooled: Whether the embedding is the mean of the last feature over its positions.
    """

    num_classes: int
    features: tuple[tuple[int, int, int], ...] | None = None
    embedding: int | None = None
    branches: tuple[NetSpec, ...] = ()
    pooled: bool = True


@dataclass(frozen=True)
class DataInfo:
    """What a training module has to know about its data.

    Attributes:
        num_classes: K.
        input_size: Side of square images in pixels, or their height and width.
        mean: Mean of each channel that the images were normalised with, of pixels in 0 to 1; None when unknown.
        std: Standard deviation of each channel, as ``mean``.
        class_names: Name of each class in the order of the targets; None when unknown.
        channels: Channels of the images. None for as many as ``mean`` has, or 3 without one.

    Examples:
        >>> DataInfo(10, input_size=(48, 64), mean=(0.5,), std=(0.25,)).image_shape
        (1, 48, 64)
    """

    num_classes: int
    input_size: ImageSize = 32
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        """Turn lists and arrays into tuples of Python's numbers, and equal sides into one number; check all values."""
        for name in ("mean", "std", "class_names"):
            if (values := getattr(self, name)) is not None:
                if name == "class_names" and isinstance(values, (str, Mapping)):
                    raise _refused(name, repr(values)[:60], "a list of names in the order of the targets")
                object.__setattr__(self, name, tuple(map(as_plain, values)))
        for name in ("num_classes", "channels", "input_size"):
            object.__setattr__(self, name, as_plain(getattr(self, name)))
        sides = (self.input_size,) if isinstance(self.input_size, int) else tuple(map(as_plain, self.input_size))
        if len(sides) == 2 and sides[0] == sides[1]:
            sides = sides[:1]
        object.__setattr__(self, "input_size", sides[0] if len(sides) == 1 else sides)
        self._check(sides)

    def _check(self, sides: tuple[int, ...]) -> None:
        if not _is_count(self.num_classes):
            raise _refused("num_classes", self.num_classes, "a whole number, 1 or more")
        if len(sides) not in (1, 2) or not all(map(_is_count, sides)):
            raise _refused("input_size", self.input_size, "a side in pixels, or height and width, each 1 or more")
        if self.channels is not None and not _is_count(self.channels):
            raise _refused("channels", self.channels, "a whole number, 1 or more, or None")
        for name, values, low in (("mean", self.mean, -math.inf), ("std", self.std, 0.0)):
            if values is None:
                continue
            if not values or not all(isinstance(each, int | float) and low < each < math.inf for each in values):
                kind = "a finite number above 0" if name == "std" else "a finite number"
                raise _refused(name, values, f"{kind} for each channel")
            if self.channels not in (None, len(values)):
                raise _refused(name, values, f"one number for each of the {self.channels} channels")
        check_scale(self.mean, self.std, " in DataInfo")
        if (self.mean is None) != (self.std is None):
            name, other = ("std", "mean") if self.std is None else ("mean", "std")
            raise _refused(name, None, f"one number for each of the channels of {other}, or both None")
        if self.mean and self.std and len(self.mean) != len(self.std):
            raise _refused("std", self.std, f"one number for each of the {len(self.mean)} channels of mean")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            shown = f"{len(self.class_names)} names"
            raise _refused("class_names", shown, f"one name for each of the {self.num_classes} classes")
        names = self.class_names or ()
        wrong = [each for each in names if not isinstance(each, str)]
        wrong += [each for each, count in Counter(names).items() if count > 1]
        if wrong:
            raise _refused("class_names", f"{wrong[0]!r} among {len(names)} names", "a different text for each class")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels = self.channels or (len(self.mean) if self.mean else 3)
        return (channels, *height_width(self.input_size))


@dataclass(frozen=True, slots=True)
class Examples:
    """Images and what a method generated from them.

    Attributes:
        original: ``B x C x H x W``, as the networks read them.
        made: Generated images of the same shape.
        predictions: ``2 x B`` int64 by name of the network: classes of the originals and of the generated images.
        target: ``B`` int64.
    """

    original: Tensor
    made: Tensor
    predictions: Mapping[str, Tensor]
    target: Tensor
