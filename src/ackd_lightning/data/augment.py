"""Batched augmentation on the training device, keyed by (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ackd_lightning.data.sampling import STREAM_CROP_X, STREAM_CROP_Y, STREAM_FLIP, Part
from ackd_lightning.random import keyed_bits, keyed_integers


class RawBatch(NamedTuple):
    """One batch as it leaves a loader, before augmentation and normalisation.

    Attributes:
        image: ``B x C x H x W`` uint8.
        target: ``B`` int64 class indices.
        index: ``B`` int64 positions in the part that is read (training, validation or test), from 0.
        epoch: ``B`` int64 epoch that keys the augmentation, or -1 where nothing is left to augment (evaluation, and
            images that a worker has augmented).
    """

    image: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # the tuple's own method of that name is not needed
    epoch: Tensor


class Keys(NamedTuple):
    """One batch as it leaves a loader where the device holds the images: what to gather them by.

    Attributes:
        part: which part is read.
        index: ``B`` int64 positions in that part.
        epoch: ``B`` int64, as in `RawBatch`.
    """

    part: Part
    index: Tensor  # type: ignore[assignment]  # the tuple's own method of that name is not needed
    epoch: Tensor


def shift_and_flip(image: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Cut each image out of its zero-padded self at an own offset, then mirror some of them.

    Args:
        image: ``B x C x H x W`` of any type.
        down: ``B`` int64, row of the image at which the cut starts (negative: that many rows of zeros on top).
        right: ``B`` int64, the same for columns.
        flip: ``B`` bool, mirrored left to right after the cut.

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
    """Augment a batch: random crop out of zero padding of ``pad`` pixels, and a mirror image half of the time.

    Each sample's offsets are a hash of (seed, its epoch, its index); a sample of epoch -1 comes back unchanged.

    Args:
        batch: images and their keys.
        pad: width of the padding in pixels.
        flip: whether to mirror at all.
        seed: seed of the run.

    Returns:
        ``B x C x H x W`` uint8.
    """
    keys = (seed, batch.epoch, batch.index)
    train = batch.epoch >= 0
    zero = torch.zeros_like(batch.epoch)
    down = torch.where(train, keyed_integers(2 * pad + 1, *keys, STREAM_CROP_Y) - pad, zero)
    right = torch.where(train, keyed_integers(2 * pad + 1, *keys, STREAM_CROP_X) - pad, zero)
    mirror = train & (keyed_bits(*keys, STREAM_FLIP) % 2 == 1) if flip else torch.zeros_like(train)
    return shift_and_flip(batch.image, down, right, mirror)


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 pixels into ``(pixel / 255 - mean) / std`` per channel (float32, same shape)."""
    scale = torch.tensor([1.0 / (255.0 * s) for s in std], device=image.device)
    offset = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=image.device)
    return image.to(torch.float32, copy=True).mul_(scale[:, None, None]).sub_(offset[:, None, None])
