"""Datasets of images in host memory, on the training device, and in files that are decoded on demand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ackd_lightning.data.decoding import read_image
from ackd_lightning.data.sampling import STREAM_TRANSFORM, Part
from ackd_lightning.data.transforms import Keys, RawBatch, random_crop
from ackd_lightning.random import mix

Key = tuple[int, int]
"""Epoch and index of a training sample."""


def _pixels(image: Image.Image) -> Tensor:
    """Copy an RGB image to ``3 x H x W`` uint8 (colours innermost in memory)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _as_keys(keys: Sequence[int | Key]) -> tuple[Tensor, Tensor]:
    """Split sampler keys, ``(epoch, index)`` in training and ``index`` in evaluation, into two ``B`` tensors."""
    pairs = [key if isinstance(key, tuple) else (-1, key) for key in keys]
    both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


class TensorImages(Dataset[RawBatch]):
    """Images in memory; a whole batch is gathered at once.

    Args:
        images: ``M x 3 x S x S`` uint8.
        targets: ``M`` int64 class indices.
        rows: ``N`` positions in ``images`` that make up this part; a sample's index is its position in ``rows``.
    """

    def __init__(self, images: Tensor, targets: Tensor, rows: Tensor) -> None:
        self.images = images
        self.targets = targets
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, keys: Sequence[int | Key]) -> RawBatch:
        epoch, index = _as_keys(keys)
        rows = self.rows[index]
        return RawBatch(self.images[rows], self.targets[rows], index, epoch)

    def __getitem__(self, key: int | Key) -> RawBatch:
        return self.__getitems__([key])


class HeldImages(Dataset[Keys]):
    """Images that the training device holds; a batch is only their positions.

    Args:
        part: Part of the data.
        count: ``N``, the number of its images.
    """

    def __init__(self, part: Part, count: int) -> None:
        self.part: Part = part
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, keys: Sequence[int | Key]) -> Keys:
        epoch, index = _as_keys(keys)
        return Keys(self.part, index, epoch)

    def __getitem__(self, key: int | Key) -> Keys:
        return self.__getitems__([key])


class FileImages(Dataset[RawBatch]):
    """Images that are decoded on demand, in worker processes if there are any.

    Training (keys with an epoch): random resized crop and mirror image, which depend only on (seed, epoch, index). The
    crop is resized bilinearly with antialiasing by torch on uint8, which is faster than PIL; some pixels differ from
    PIL's by one grey level. Evaluation: shorter side resized to 8/7 of the size, centre crop, by PIL. Nothing is left
    to augment, so ``epoch`` is -1 in every batch.

    Args:
        paths: ``M`` image files.
        targets: ``M`` int64 class indices.
        rows: ``N`` positions in ``paths`` that make up this part; a sample's index is its position in ``rows``.
        size: Height and width of the images that are returned, in pixels.
        seed: Seed of the run.
    """

    def __init__(self, paths: Sequence[Path], targets: Tensor, rows: Tensor, *, size: int, seed: int) -> None:
        # An array of bytes, not a list: a worker that changes the reference counts of a list copies its memory.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.targets = targets
        self.rows = rows
        self.size = size
        self.seed = seed
        self.eval_transform = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.rows)

    def _image(self, row: int, epoch: int, index: int) -> Tensor:
        path = Path(os.fsdecode(bytes(self.paths[row])))
        if epoch < 0:
            return _pixels(self.eval_transform(read_image(path)))
        image = read_image(path)
        box, mirror = random_crop(*image.size, mix(self.seed, epoch, index, STREAM_TRANSFORM))
        crop = _pixels(image.crop(box))[None]
        resized = F.interpolate(crop, size=(self.size, self.size), mode="bilinear", antialias=True)[0]
        return resized.flip(2) if mirror else resized

    def __getitems__(self, keys: Sequence[int | Key]) -> RawBatch:
        epoch, index = _as_keys(keys)
        rows = self.rows[index]
        images = torch.empty(len(rows), 3, self.size, self.size, dtype=torch.uint8)
        each = zip(images, rows.tolist(), epoch.tolist(), index.tolist(), strict=True)
        for image, *key in each:
            image.copy_(self._image(*key))
        return RawBatch(images, self.targets[rows], index, torch.full_like(index, -1))

    def __getitem__(self, key: int | Key) -> RawBatch:
        return self.__getitems__([key])
