"""Augmentation beyond crop and mirror image: policies, erasing, and mixtures of two images, by `torchvision`'s v2.

`torchvision` draws from torch's generator. It is seeded for every image by (seed, epoch, index), and for every mixed
batch by (seed, epoch, index of its first image), and left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ackd_lightning.data.sampling import STREAM_MIX, STREAM_POLICY
from ackd_lightning.data.transforms import RawBatch
from ackd_lightning.errors import ACKDError
from ackd_lightning.random import mix
from ackd_lightning.types import Batch
from ackd_lightning.validation import Fraction, NonNegative, PositiveInt, Range, check_arguments

Policy = Literal["none", "randaugment", "trivialaugment"]
First = tuple[int, int]
"""Epoch and index of the first image of a training batch."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation of training images besides mirror image and, for small ones, zero-padded crop.

    Attributes:
        policy: ``randaugment`` applies ``operations`` random operations of one ``magnitude`` to every image,
            ``trivialaugment`` one operation of a random magnitude.
        operations: Operations per image of ``randaugment``.
        magnitude: Magnitude of these operations, from 0 to 30.
        erasing: Probability that a random rectangle of an image is replaced by the mean colour.
        mixup: Parameter alpha of the beta distribution that the shares of two mixed images are drawn from; 0 for no
            mixup.
        cutmix: Parameter alpha of the beta distribution that the area of a rectangle from another image is drawn from;
            0 for no cutmix. With mixup and cutmix, every batch gets one of them, each half of the time.
        smallest_crop: Smallest share of an image's area that the random crop of images above 64 pixels keeps, as the
            first number of torchvision's ``scale``.
    """

    policy: Policy = "none"
    operations: PositiveInt = 2
    magnitude: Annotated[int, Range(0, 30)] = 9
    erasing: Fraction = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    smallest_crop: Annotated[float, Range(0.01, 1)] = 0.08

    def __post_init__(self) -> None:
        """Check the values."""
        check_arguments(type(self), {each.name: getattr(self, each.name) for each in fields(self)})

    def mixing(self) -> str:
        """Return how images are mixed, in words; empty when they are not."""
        return ", ".join(f"{name} {getattr(self, name):g}" for name in ("mixup", "cutmix") if getattr(self, name))

    @property
    def changes_images(self) -> bool:
        """Whether single images are changed, which a process does before it copies them to its device."""
        return self.policy != "none" or self.erasing > 0


class ImageAugmentation:
    """Policy and erasing of single images.

    Args:
        augmentation: What to do.
        mean: Mean of each channel, of pixels in 0 to 1: the colour of erased rectangles.
        seed: Seed of the run.
        deep: Whether images are float32 from 0 to 1, instead of uint8.

    Raises:
        ACKDError: If a policy, which changes colours, is asked for images that are neither grey nor RGB.
    """

    def __init__(self, augmentation: Augmentation, mean: Sequence[float], seed: int, *, deep: bool = False) -> None:
        if augmentation.policy != "none" and len(mean) not in (1, 3):
            raise ACKDError(
                f"data.augmentation.policy is {augmentation.policy} and images have {len(mean)} channels; it changes "
                "the colours of images with 1 or 3, so set it to none"
            )
        self.seed = seed
        steps: list[v2.Transform] = [v2.Identity()]
        if augmentation.policy == "randaugment":
            steps.append(v2.RandAugment(augmentation.operations, augmentation.magnitude))
        elif augmentation.policy == "trivialaugment":
            steps.append(v2.TrivialAugmentWide())
        if augmentation.erasing:
            colour = [float(each) if deep else round(255 * each) for each in mean]
            steps.append(v2.RandomErasing(augmentation.erasing, value=colour))
        self.transform = v2.Compose(steps)

    def __call__(self, image: Tensor, epoch: int, index: int) -> Tensor:
        """Augment one image.

        Args:
            image: ``C x H x W`` uint8, or float32 from 0 to 1.
            epoch: Epoch.
            index: Position in the training part.
        """
        with seeded(mix(self.seed, epoch, index, STREAM_POLICY)):
            changed: Tensor = self.transform(image)
        return changed


class Mixing:
    """Mixup and cutmix of the images of a batch, each with the image before it.

    Args:
        augmentation: What to do.
        num_classes: K.
        seed: Seed of the run.
    """

    def __init__(self, augmentation: Augmentation, num_classes: int, seed: int) -> None:
        kinds = ((v2.MixUp, augmentation.mixup), (v2.CutMix, augmentation.cutmix))
        steps = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
        self.transform = v2.RandomChoice(steps) if len(steps) > 1 else steps[0]
        self.seed = seed

    def __call__(self, batch: Batch, first: First) -> Batch:
        """Mix a batch; ``target`` becomes the class with the largest share.

        Args:
            batch: Normalised images with hard labels.
            first: Epoch and index of the first image.
        """
        with seeded(mix(self.seed, *first, STREAM_MIX)):
            image, soft = self.transform(batch.image, batch.target)
        return Batch(image, soft.argmax(dim=1), batch.index, soft)


class AugmentedImages(Dataset[Any]):
    """A training set whose images are augmented as they are read, and whose batches can be mixed.

    Args:
        images: Dataset that returns whole batches of uint8 images or, when nothing changes single images, positions.
        crop: Crop and mirror image of a batch, which come before ``change``; None where ``images`` has done that.
        change: Policy and erasing; None to leave the images to the device.
    """

    def __init__(
        self, images: Any, crop: Callable[[RawBatch], Tensor] | None, change: ImageAugmentation | None
    ) -> None:
        self.images, self.crop, self.change = images, crop, change

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[int | First]) -> Any:
        batch = self.images.__getitems__(keys)
        pairs = [key for key in keys if isinstance(key, tuple)]
        if not pairs:
            return batch  # a sampler of Lightning's, for `overfit_batches`, has no epochs
        batch = batch._replace(first=pairs[0])
        if self.change is None:
            return batch
        image = batch.image if self.crop is None else self.crop(batch)
        changed = [self.change(each, *key) for each, key in zip(image, pairs, strict=True)]
        return batch._replace(image=torch.stack(changed), epoch=torch.full_like(batch.epoch, -1))

    def __getitem__(self, key: int | First) -> Any:
        return self.__getitems__([key])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU inside the block, and restore it after.

    Args:
        seed: Seed, as `mix` returns it.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
