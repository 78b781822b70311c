"""Augmentation and normalisation. What is random depends only on (seed, epoch, index)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from ackd_lightning.data.sampling import STREAM_CROP_X, STREAM_CROP_Y, STREAM_FLIP, Part
from ackd_lightning.random import stateless_bits, stateless_integers

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CROP_LOG_RATIO = math.log(4 / 3)


class RawBatch(NamedTuple):
    """One batch as a loader returns it, before augmentation and normalisation.

    Attributes:
        image: ``B x C x H x W`` uint8, or float32 from 0 to 1.
        target: ``B`` int64 class indices.
        index: ``B`` int64 positions in the part that is read (training, validation or test), from 0.
        epoch: ``B`` int64 epochs that the augmentation depends on, or -1 where nothing is left to augment (evaluation,
            and images that a worker has augmented).
        first: Epoch and index of the first training image, which a mixture of the images depends on; None in
            evaluation.
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    epoch: Tensor
    first: tuple[int, int] | None = None


class Keys(NamedTuple):
    """One batch as a loader returns it when the device holds the images: where to find them.

    Attributes:
        part: Part that is read.
        index: ``B`` int64 positions in that part.
        epoch: ``B`` int64, as in `RawBatch`.
        first: Epoch and index of the first training image; None in evaluation.
    """

    part: Part
    index: Tensor  # type: ignore[assignment]  # hides tuple.index on purpose
    epoch: Tensor
    first: tuple[int, int] | None = None


def shift_and_flip(image: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Crop each zero-padded image at its own offset, then mirror some of them.

    Args:
        image: ``B x C x H x W`` of any type.
        down: ``B`` int64, row of the image at which the crop starts (negative: that many rows of zeros on top).
        right: ``B`` int64, the same for columns.
        flip: ``B`` bool, true where the crop is mirrored left to right.

    Returns:
        ``B x C x H x W``, a new contiguous tensor.
    """
    count, channels, height, width = image.shape
    rows = torch.arange(height, device=image.device) + down[:, None]
    cols = torch.arange(width, device=image.device).expand(count, width)
    cols = torch.where(flip[:, None], width - 1 - cols, cols) + right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None, :]
    source = rows.clamp(0, height - 1)[:, :, None] * width + cols.clamp(0, width - 1)[:, None, :]
    flat = source.view(count, 1, height * width).expand(count, channels, height * width)
    moved = image.flatten(2).gather(2, flat).view(count, channels, height, width)
    return moved * inside[:, None]


def crop_flip(batch: RawBatch, *, pad: int, flip: bool, seed: int) -> Tensor:
    """Augment a batch: random crop after zero padding of ``pad`` pixels, mirrored half of the time.

    Each sample's offsets are a hash of (seed, its epoch, its index); a sample with epoch -1 is returned unchanged.

    Args:
        batch: Images with their epochs and positions.
        pad: Width of the padding in pixels.
        flip: Whether to mirror at all.
        seed: Seed of the run.

    Returns:
        ``B x C x H x W`` uint8.
    """
    keys = (seed, batch.epoch, batch.index)
    train = batch.epoch >= 0
    zero = torch.zeros_like(batch.epoch)
    down = torch.where(train, stateless_integers(2 * pad + 1, *keys, STREAM_CROP_Y) - pad, zero)
    right = torch.where(train, stateless_integers(2 * pad + 1, *keys, STREAM_CROP_X) - pad, zero)
    mirror = train & (stateless_bits(*keys, STREAM_FLIP) % 2 == 1) if flip else torch.zeros_like(train)
    return shift_and_flip(batch.image, down, right, mirror)


@functools.lru_cache(maxsize=64)
def _scale_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...], largest: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return what pixels are multiplied by and what is subtracted then, ``C`` float32 each, on a device."""
    with torch.inference_mode(False):
        scale = torch.tensor([1.0 / (largest * s) for s in std], device=device)
        return scale, torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=device)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn pixels into ``(pixel - mean) / std`` per channel, those of uint8 divided by 255 first.

    Args:
        image: ``B x C x H x W`` uint8, or float from 0 to 1.
        mean: Mean of each channel, of pixels in 0 to 1.
        std: Standard deviation of each channel, of pixels in 0 to 1.

    Returns:
        ``B x C x H x W`` float32.
    """
    largest = 1.0 if image.is_floating_point() else 255.0
    # a device is waited for when numbers are sent to it, so they are sent once
    constants = _scale_and_offset.__wrapped__ if image.device.type == "cpu" else _scale_and_offset
    scale, offset = constants(tuple(mean), tuple(std), largest, image.device)
    return image.to(torch.float32, copy=True).mul_(scale[:, None, None]).sub_(offset[:, None, None])


def random_crop(width: int, height: int, seed: int, smallest: float = 0.08) -> tuple[tuple[int, int, int, int], bool]:
    """Choose a random resized crop as `torchvision.transforms.v2.RandomResizedCrop` does, and whether to mirror it.

    The crop has between ``smallest`` and all of the area and an aspect ratio between 3:4 and 4:3. A crop that does not
    fit into the image is drawn again; after ten draws the largest centred crop with an allowed aspect ratio is taken.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        seed: Seed of the draw, which depends on nothing else.
        smallest: Smallest share of the area, above 0 and at most 1.

    Returns:
        Left, upper, right and lower edge of the crop, and whether it is mirrored (half of the time).
    """
    draw = Random(seed)
    mirror = draw.random() < 0.5
    for _ in range(10):
        side = math.sqrt(width * height * draw.uniform(smallest, 1.0))
        stretch = math.exp(draw.uniform(-_CROP_LOG_RATIO, _CROP_LOG_RATIO) / 2)
        wide, tall = round(side * stretch), round(side / stretch)
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(draw.random() * (width - wide + 1)), int(draw.random() * (height - tall + 1))
            break
    else:
        wide, tall = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - wide) // 2, (height - tall) // 2
    return (left, top, left + wide, top + tall), mirror
