"""Datasets of images in host memory, on the training device, and in files that are decoded on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as vision

from ackd_lightning.data.decoding import ImageFile, label, load_for_crop, read_image
from ackd_lightning.data.pixels import Decoded, ImageFormat, convert, fit, height_and_width, to_tensor
from ackd_lightning.data.sampling import STREAM_TRANSFORM, Part
from ackd_lightning.data.transforms import Keys, RawBatch, random_crop
from ackd_lightning.random import mix

EVAL_BORDER = 256 / 224
"""Size of an image before its centre is cropped in evaluation, relative to that after it."""
IN_MEMORY = 64
"""Largest side in pixels at which images of a user's own are kept in memory."""
Key = tuple[int, int]
"""Epoch and index of a training sample."""


def _as_keys(keys: Sequence[int | Key]) -> tuple[Tensor, Tensor]:
    """Split sampler keys, ``(epoch, index)`` in training and ``index`` in evaluation, into two ``B`` tensors."""
    pairs = [key if isinstance(key, tuple) else (-1, key) for key in keys]
    both = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


def reduction(form: ImageFormat, seed: int, smallest: float) -> Callable[[int, int], int]:
    """Return the factor by which a JPEG of some height and width may be reduced before `augmented_crop`.

    Args:
        form: What the image becomes.
        seed: Seed of the crop.
        smallest: Smallest share of the image's area.

    Returns:
        Function for `load_for_crop`: the largest of 8, 4, 2 and 1 at which the crop has the size of the result or more.
    """

    def factor(height: int, width: int) -> int:
        (left, top, right, bottom), _ = random_crop(width, height, seed, smallest)
        times = min((bottom - top) // form.size[0], (right - left) // form.size[1])
        return next(by for by in (8, 4, 2, 1) if by <= max(1, times))

    return factor


def augmented_crop(
    image: Decoded, form: ImageFormat, seed: int, smallest: float, whole: tuple[int, int] | None = None
) -> Tensor:
    """Return a random resized crop of an image, mirrored half of the time, as ``C x H x W``.

    Args:
        image: Decoded image.
        form: What it becomes.
        seed: Seed of the draw, which depends on nothing else.
        smallest: Smallest share of the image's area.
        whole: Height and width before the image was reduced; None if it was not.
    """
    size = height_and_width(image)
    height, width = whole or size
    (left, top, right, bottom), mirror = random_crop(width, height, seed, smallest)
    if whole is not None:
        top, bottom = (round(edge * size[0] / height) for edge in (top, bottom))
        left, right = (round(edge * size[1] / width) for edge in (left, right))
    crop = to_tensor(vision.crop(image, top, left, bottom - top, right - left), form)[None]
    resized = F.interpolate(crop, size=form.size, mode="bilinear", antialias=True)[0]
    return resized.flip(2) if mirror else resized


class TensorImages(Dataset[RawBatch]):
    """Images in memory; a whole batch is gathered at once.

    Args:
        images: ``M x C x H x W`` uint8, or float32 from 0 to 1.
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

    Training (keys with an epoch): random resized crop and mirror image, which depend only on (seed, epoch, index). A
    JPEG whose crop has at least twice the size of the result is decoded at a half, a quarter or an eighth. The crop is
    resized bilinearly with antialiasing by torch on uint8, which is faster than PIL; some pixels differ from
    PIL's by one grey level. Evaluation: resized until it covers 8/7 of the size, centre crop, by PIL. Nothing is left
    to augment, so ``epoch`` is -1 in every batch.

    Args:
        opener: Function that returns an image file for each of ``M`` positions; it can be pickled.
        targets: ``M`` int64 class indices, -1 without a label.
        rows: ``N`` positions that make up this part; a sample's index is its position in ``rows``.
        form: What the files become.
        seed: Seed of the run.
        smallest_crop: Smallest share of an image's area in training.
    """

    def __init__(
        self,
        opener: Callable[[int], ImageFile],
        targets: Tensor,
        rows: Tensor,
        *,
        form: ImageFormat,
        seed: int,
        smallest_crop: float = 0.08,
    ) -> None:
        self.opener = opener
        self.targets = targets
        self.rows = rows
        self.form = form
        self.seed = seed
        self.smallest_crop = smallest_crop

    def __len__(self) -> int:
        return len(self.rows)

    def _image(self, row: int, epoch: int, index: int) -> Tensor:
        file, form = self.opener(row), self.form
        if epoch < 0:
            return to_tensor(fit(read_image(file, form), form.size, border=EVAL_BORDER), form)
        seed = mix(self.seed, epoch, index, STREAM_TRANSFORM)
        raw, whole = load_for_crop(file, form.channels, reduction(form, seed, self.smallest_crop))
        return augmented_crop(convert(raw, form, label(file)), form, seed, self.smallest_crop, whole)

    def __getitems__(self, keys: Sequence[int | Key]) -> RawBatch:
        epoch, index = _as_keys(keys)
        rows = self.rows[index]
        images = torch.empty(len(rows), self.form.channels, *self.form.size, dtype=self.form.dtype)
        each = zip(images, rows.tolist(), epoch.tolist(), index.tolist(), strict=True)
        for image, *key in each:
            image.copy_(self._image(*key))
        return RawBatch(images, self.targets[rows], index, torch.full_like(index, -1))

    def __getitem__(self, key: int | Key) -> RawBatch:
        return self.__getitems__([key])
