"""Comparison of a file with the trained network on the images of its data, before the file gets its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ackd_lightning.data.base import ImageDataModule, info_of
from ackd_lightning.data.transforms import normalise
from ackd_lightning.data.webdataset import WebDatasetDataModule
from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.metrics.guessing import mean_recall
from ackd_lightning.models.outputs import logits_of
from ackd_lightning.training.batches import read_batch

LEAST = 512
"""Number of images that a file is compared on, as long as there are so many."""
MOST = 1024
"""Largest number of evaluation images that a file is compared on; they are spread evenly."""
_RANDOM = 64


@dataclass(frozen=True)
class Limits:
    """What a file may change.

    Attributes:
        difference: Largest difference of a logit, relative to the largest logit; None for any.
        agreement: Smallest share of images with the same most probable class.
        accuracy_loss: Largest loss of accuracy.
    """

    difference: float | None
    agreement: float
    accuracy_loss: float


LIMITS = {
    "float32": Limits(1e-3, 0.99, 0.005),
    "float16": Limits(2e-2, 0.98, 0.01),
    "bfloat16": Limits(0.1, 0.95, 0.02),
    "int8": Limits(None, 0.8, 0.05),  # kernels round each layer in their own way
}
"""Limits by the type of the weights, or of the quantization."""


class CheckImages:
    """Images that files are compared on, as they are before normalisation.

    Args:
        batches: Images with their classes (-1 without one), a batch each.
        normalised: Function from a batch to normalised images.
        part: Part of the data that accuracy is measured on, ``val`` or ``test``; None for none.
        counted: Number of images, from the first, that accuracy is measured on.
        words: What the images are.
    """

    def __init__(
        self,
        batches: list[tuple[Tensor, Tensor]],
        normalised: Callable[[Tensor], Tensor],
        *,
        part: str | None,
        counted: int,
        words: str,
    ) -> None:
        self.batches, self._normalised = batches, normalised
        self.part, self.counted, self.words = part, counted, words

    @property
    def counted_words(self) -> str:
        """What the images are that accuracy is measured on."""
        return f"{self.counted:,} {'test' if self.part == 'test' else 'validation'} images"

    def as_uint8(self, prepared: Preprocessing) -> CheckImages:
        """Return the images as a network reads them that converts and normalises uint8 itself.

        Args:
            prepared: How the network prepares images.
        """
        if all(image.dtype == torch.uint8 for image, _ in self.batches):
            return self
        rounded = [(prepared.raw(image), target) for image, (_, target) in zip(self, self.batches, strict=True)]
        words = f"{self.words}, rounded to 8 bits"
        return CheckImages(rounded, prepared.normalised, part=self.part, counted=self.counted, words=words)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield normalised images, ``B x C x H x W``."""
        return (self._normalised(image) for image, _ in self.batches)

    @property
    def targets(self) -> Tensor:
        """``N`` int64 classes."""
        return torch.cat([target for _, target in self.batches])

    @torch.no_grad()
    def logits(self, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Run a network on all images.

        Args:
            run: Function from normalised images to logits.

        Returns:
            ``N x K`` float32 on the CPU.
        """
        return torch.cat([logits_of(run(each)).float().cpu() for each in self])

    def accuracy(self, logits: Tensor) -> float | None:
        """Share of images with the right class; None without classes.

        Args:
            logits: ``N x K``.
        """
        target, answers = self._known(logits)
        return float((answers == target).float().mean()) if len(target) else None

    def may_be_chance(self, logits: Tensor) -> bool:
        """Whether guessing may be as good as these logits, as `MeanRecall.may_be_chance` says; False without classes.

        Args:
            logits: ``N x K``.
        """
        target, answers = self._known(logits)
        return len(target) > 0 and mean_recall(target, answers, logits.shape[1]).may_be_chance

    def _known(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Class and most probable class of the images whose class is known."""
        target, answers = self.targets[: self.counted], logits[: self.counted].argmax(1)
        return target[target >= 0], answers[target >= 0]


def images_of(data: Any) -> CheckImages:
    """Return images of a data module after ``setup``: those of its validation, and training images where they are few.

    Args:
        data: Data module.
    """
    if isinstance(data, ImageDataModule) and not isinstance(data, WebDatasetDataModule):
        return _own_images(data)
    batches: list[tuple[Tensor, Tensor]] = []
    known = info_of(data)
    for raw in data.val_dataloader():
        batch = read_batch(data.on_after_batch_transfer(raw, 0), known)
        batches.append((batch.image, batch.target))
        if sum(len(each) for _, each in batches) >= LEAST:
            break
    count = sum(len(each) for _, each in batches)
    part, kind = ("test", "test") if getattr(data, "val_is_test", False) else ("val", "validation")
    return CheckImages(
        batches, lambda each: each, part=part, counted=count, words=f"{count} {kind} images of {_name(data)}"
    )


def _own_images(data: ImageDataModule) -> CheckImages:
    batches = [(each.image, each.target) for each in data.loader_in_order("val", most=MOST)]
    counted = sum(len(target) for _, target in batches)
    part = "test" if data.val_is_test else "val"
    words = f"{counted} {'test' if data.val_is_test else 'validation'}"
    if counted < LEAST:
        more = [(each.image, each.target) for each in data.loader_in_order("train", most=LEAST - counted)]
        batches += more
        words += f" and {sum(len(target) for _, target in more)} training"
    mean, std = data.mean, data.std
    return CheckImages(
        batches,
        lambda image: normalise(image, mean, std),
        part=part,
        counted=counted,
        words=f"{words} images of {_name(data)}",
    )


def _name(data: Any) -> str:
    return type(data).__name__.removesuffix("DataModule")


def random_images(description: Description) -> CheckImages:
    """Return random pixels, for networks whose data are not there.

    Args:
        description: What the network expects.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_RANDOM, *description.image_shape)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    mean = description.mean or (0.5,) * description.channels
    std = description.std or (0.25,) * description.channels
    return CheckImages(
        [(pixels, torch.full((_RANDOM,), -1))],
        lambda image: normalise(image, mean, std),
        part=None,
        counted=0,
        words=f"{_RANDOM} random images, and none of its data",
    )


SINGLE = "{} takes one image at a time, as the exporter cannot leave the batch of this network open"
"""Note on a file whose batch is 1."""


@dataclass(frozen=True)
class Check:
    """Result of a comparison.

    Attributes:
        difference: Largest absolute difference of a logit.
        scale: Largest absolute logit of the trained network.
        agreement: Share of images with the same most probable class.
        before: Accuracy of the trained network; None without classes.
        after: Accuracy of the file.
        single: Whether the file takes one image at a time alone.
    """

    difference: float
    scale: float
    agreement: float
    before: float | None
    after: float | None
    single: bool = False

    def problem(self, limits: Limits, images: CheckImages) -> str | None:
        """Say what is beyond the limits; None when nothing is.

        Args:
            limits: What a file may change.
            images: Images of the check.
        """
        if not self.difference < float("inf"):
            return f"its logits are not finite on {images.words}"
        most = None if limits.difference is None else limits.difference * max(1.0, self.scale)
        if most is not None and self.difference > most:
            return f"its logits differ by up to {self.difference:.3g}, more than {most:.3g}, on {images.words}"
        if self.agreement < limits.agreement:
            return f"its most probable class is the same for {self.agreement:.2%} of {images.words}"
        if self.before is not None and self.after is not None and self.before - self.after > limits.accuracy_loss:
            return f"its accuracy is {self.after:.2%} instead of {self.before:.2%} on {images.counted_words}"
        return None


def compare(images: CheckImages, reference: Tensor, run: Callable[[Tensor], Tensor], *, single: bool = False) -> Check:
    """Compare a file with the trained network.

    Args:
        images: Images.
        reference: ``N x K`` logits of the trained network.
        run: Function from normalised images to the logits of the file.
        single: Whether the file takes one image at a time alone.
    """
    found = images.logits(run)
    difference = (found - reference).abs().max()
    return Check(
        float(difference.nan_to_num(nan=float("inf"))),
        float(reference.abs().max()),
        float((found.argmax(1) == reference.argmax(1)).float().mean()),
        images.accuracy(reference),
        images.accuracy(found),
        single,
    )


def is_other(accuracy: float, known: float, count: int) -> bool:
    """Return whether an accuracy is another one than the run measured on all images of that part.

    Args:
        accuracy: Share of right images.
        known: Share of right images in the run.
        count: Number of images.

    Returns:
        True if they differ by more than two points, for rounding, and four standard deviations.
    """
    mean = (accuracy + known) / 2
    return abs(accuracy - known) > 0.02 + 4 * math.sqrt(mean * (1 - mean) / max(count, 1))
