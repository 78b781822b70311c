"""Loaders of a data module, and augmentation and normalisation of their batches on the device."""

from __future__ import annotations

import functools
import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor

from ackd_lightning.data.arguments import PlainArguments
from ackd_lightning.data.augmentation import Augmentation, AugmentedImages, ImageAugmentation, Mixing
from ackd_lightning.data.datasets import FileImages, HeldImages, TensorImages
from ackd_lightning.data.messages import say
from ackd_lightning.data.pixels import ImageFormat
from ackd_lightning.data.sampling import EpochSampler, ImageLoader, Part, ResumableLoader, as_is
from ackd_lightning.data.sources import Pixels, Source, content_mark
from ackd_lightning.data.transforms import Keys, RawBatch, crop_flip, normalise
from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.types import Batch, ImageSize, height_width

_HELD_SHARE = 0.25
"""Share of a GPU's free memory that the images of one part may take."""
_COPY = 4096
"""Number of images that are copied to the device at once, so that host memory never holds a second copy of all."""


_WHY_WHOLE = "the method needs whole batches"
_WHY_NOT_ONE = "a batch of one image trains neither BatchNorm nor losses that compare images"


def data_of(trainer: Any) -> Any:
    """Return the data module of what a Trainer runs now, or ran last; None for loaders alone.

    Its attribute ``datamodule`` is that of an earlier call where this one was given loaders.

    Args:
        trainer: Trainer; None without one.
    """
    called = getattr(getattr(trainer, "_data_connector", None), "_datahook_selector", None)
    return getattr(trainer if called is None else called, "datamodule", None)


class ImageLoaders(PlainArguments):
    """Loaders of training, validation and test images.

    Attributes:
        num_classes: Number of classes.
        batch_size: Global training batch size.
        eval_batch_size: Batch size of each process in validation, test and prediction.
        augmentation: Policy, erasing and mixing of training images besides crop and mirror image.
        sampling: Order of training images.
        num_workers: Number of worker processes of each loader.
        seed: Seed of shuffling and augmentation.
        whole_batches: Whether the incomplete last batch of a training epoch is left out, as some methods need it.
    """

    whole_batches: bool = False
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: ImageSize
    channels: int = 3
    batch_size: int
    eval_batch_size: int
    augmentation: Augmentation
    sampling: Literal["shuffle", "balanced"]
    num_workers: int
    seed: int | None
    _held: dict[Part, tuple[Tensor, Tensor]]
    _told_rest = False

    augment: Literal["crop_flip", "crop", "none"] = "crop_flip"
    """Augmentation of images in memory: zero-padded crop and mirror image, crop alone, or nothing."""

    @abstractmethod
    def _part(self, part: Part) -> tuple[Source, Tensor]:
        """Return the images that a part is read from, and its positions there; reads the data first."""

    @property
    def image_format(self) -> ImageFormat:
        """What image files become."""
        return ImageFormat(height_width(self.input_size), self.channels)

    @property
    def run_seed(self) -> int:
        """Seed of shuffling and augmentation."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    @property
    def train_targets(self) -> Tensor:
        """``N`` int64 class index of every training image by ``Batch.index``; known after `setup`."""
        source, rows = self._part("train")
        return source.targets[rows]

    def content_mark(self, part: Part) -> str:
        """Return a hash of the images of a part: of pixels in memory, or of the names and sizes of files.

        Args:
            part: ``train``, ``val`` or ``test``.
        """
        source, rows = self._part(part)
        kept = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        return hashlib.sha256(f"{content_mark(source)} {kept} {self.image_format}".encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> ResumableLoader:
        """Return the shuffled, resumable loader of the training part.

        The last batch of an epoch may be smaller. It is left out if the method needs whole batches, or if it has a
        single image for each process, which trains neither BatchNorm nor losses that compare images.

        Raises:
            ACKDError: If no batch is left, or the batch size is not a multiple of the processes.
        """
        world, rank = self._world()
        size = self._own_batch_size()
        dataset: Any = self._dataset("train")
        if self.augmentation.changes_images or self.augmentation.mixing():
            dataset = self._augmented(dataset)
        balance = self.train_targets if self.sampling == "balanced" else None
        sampler = EpochSampler(dataset, num_replicas=world, rank=rank, seed=self.run_seed, balance=balance)
        sampler.set_epoch(self._epoch())
        rest = len(sampler) % size
        drop = bool(rest) and (self.whole_batches or rest == 1)
        why = _WHY_WHOLE if self.whole_batches else _WHY_NOT_ONE
        if drop and len(sampler) < size:
            smaller = f"set batch_size to {len(sampler) * world} or less, or " if self.whole_batches else ""
            raise ACKDError(
                f"the training part holds {count_of(len(dataset), 'image')}, fewer than one batch of "
                f"{self.batch_size}, and {why}: {smaller}use more of the data"
            )
        if drop and not self._told_rest:
            self._told_rest = True
            say(f"left out of each epoch: {rest * world:,} of {len(dataset):,} training images, since {why}")
        elif len(sampler) < size and not self._told_rest:
            self._told_rest = True
            say(f"the training part holds {len(dataset):,} images, so each step has these instead of {self.batch_size}")
        return ResumableLoader(dataset, batch_size=size, sampler=sampler, drop_last=drop, **self._options(dataset))

    def val_dataloader(self) -> ImageLoader:
        """Return the loader of the validation part in order; of the test set when `val_is_test`."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ImageLoader:
        """Return the loader of the test set in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """Return the loader of the test set in order."""
        return self._eval_loader("test")

    def loader_in_order(self, part: Part, *, most: int | None = None) -> ImageLoader:
        """Return a loader of a part as evaluation reads it, in order and without augmentation, for this process alone.

        Args:
            part: ``train``, ``val`` or ``test``.
            most: Largest number of images, which are spread evenly over the part; None for all.
        """
        dataset = self._dataset(part)
        count = len(dataset) if most is None else min(most, len(dataset))
        rows = torch.linspace(0, len(dataset) - 1, count).round().long().tolist()
        return ImageLoader(dataset, batch_size=self.eval_batch_size, sampler=rows, **self._options(dataset))

    def _eval_loader(self, part: Part) -> ImageLoader:
        world, rank = self._world()
        dataset = self._dataset(part)
        sampler = None
        if world > 1:
            if len(dataset) < world:
                raise ACKDError(
                    f"the {part} part holds {len(dataset)} images for {world} processes: use fewer processes"
                )
            # Lightning's own sampler repeats samples until the ranks are even, and so counts some of them twice.
            sampler = UnrepeatedDistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=False)
        return ImageLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._options(dataset))

    def _augmented(self, dataset: TensorImages | FileImages | HeldImages) -> AugmentedImages:
        """Let a training set augment its images as they are read, and remember what mixing depends on."""
        if not self.augmentation.changes_images:
            return AugmentedImages(dataset, None, None)
        change = ImageAugmentation(self.augmentation, self.mean, self.run_seed, deep=self.image_format.deep)
        crop = self._crop if isinstance(dataset, TensorImages) and self.augment != "none" else None
        return AugmentedImages(dataset, crop and crop(), change)

    def _crop(self) -> Callable[[RawBatch], Tensor]:
        """Return crop and mirror image of a batch."""
        pad = min(height_width(self.input_size)) // 8  # 4 pixels at 32, 8 at 64
        return functools.partial(crop_flip, pad=pad, flip=self.augment == "crop_flip", seed=self.run_seed)

    def _options(self, dataset: Any) -> dict[str, Any]:
        """Return the options of a loader; positions need no workers and no pinned memory."""
        if isinstance(getattr(dataset, "images", dataset), HeldImages):
            return {"collate_fn": as_is}
        return {"num_workers": self.num_workers, "collate_fn": as_is, "pin_memory": self.pins_memory()}

    def pins_memory(self) -> bool:
        """Return whether batches are pinned: where a GPU gets them, and without a Trainer where there is one."""
        device = None if self.trainer is None else self.trainer.strategy.root_device.type
        return device in (None, "cuda") and torch.cuda.is_available()

    def _world(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _own_batch_size(self) -> int:
        """Number of images of a training batch in each process."""
        world, _ = self._world()
        if self.batch_size % world:
            raise ACKDError(
                f"batch_size {self.batch_size} does not divide by {world} processes: it is the global batch, so use a "
                f"multiple of {world}"
            )
        return self.batch_size // world

    def _epoch(self) -> int:
        """Epoch in which a fit is or begins.

        Lightning calls ``set_epoch`` only after workers have started (#21938): a resumed run would replay epoch 0.
        """
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        return int(progress.processed)

    def _dataset(self, part: Part) -> TensorImages | FileImages | HeldImages:
        source, rows = self._part(part)
        if isinstance(source, Pixels):
            changed = part == "train" and self.augmentation.changes_images  # by the process, image by image
            if not changed and self._hold(len(rows) * source.images[0].nbytes):
                return HeldImages(part, len(rows))
            return TensorImages(source.images, source.targets, rows)
        return FileImages(
            source.opener(),
            source.targets,
            rows,
            form=self.image_format,
            seed=self.run_seed,
            smallest_crop=self.augmentation.smallest_crop,
        )

    # --------------------------------------------------------------------------------------------------- the device

    def _hold(self, size: int) -> bool:
        """Whether the trainer's device holds a part of ``size`` bytes, instead of receiving it batch by batch."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return device.type == "cuda" and size <= _HELD_SHARE * torch.cuda.mem_get_info(device)[0]

    def _gather(self, keys: Keys) -> RawBatch:
        """Look up a batch on the device of its positions; the part is copied there the first time."""
        device = keys.index.device
        if keys.part not in self._held or self._held[keys.part][0].device != device:
            source, rows = self._part(keys.part)
            assert isinstance(source, Pixels)
            images = torch.empty(len(rows), *source.images.shape[1:], dtype=source.images.dtype, device=device)
            for start in range(0, len(rows), _COPY):
                images[start : start + _COPY] = source.images[rows[start : start + _COPY]]
            self._held[keys.part] = images, source.targets[rows].to(device)
        images, targets = self._held[keys.part]
        return RawBatch(images[keys.index], targets[keys.index], keys.index, keys.epoch, keys.first)

    def teardown(self, stage: str | None = None) -> None:
        """Free what the device holds.

        Args:
            stage: Lightning's stage; ignored.
        """
        self._held.clear()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment and normalise on the device, where a part that it holds is gathered first.

        Args:
            batch: Batch of a loader, on the device; anything but `RawBatch` and `Keys` is returned unchanged.
            dataloader_idx: Number of the loader; ignored.
        """
        if isinstance(batch, Keys):
            batch = self._gather(batch)
        if not isinstance(batch, RawBatch):
            return batch
        image = batch.image
        # On a GPU, waiting for the answer to `any` would cost more than the augmentation.
        if self.augment != "none" and (image.is_cuda or bool((batch.epoch >= 0).any())):
            image = self._crop()(batch)
        done = Batch(normalise(image, self.mean, self.std), batch.target, batch.index)
        if batch.first is not None and self.augmentation.mixing():
            done = Mixing(self.augmentation, self.num_classes, self.run_seed)(done, batch.first)
        # Under true half precision the trainer converted the batch while it was still uint8: convert it now.
        return done if self.trainer is None else self.trainer.precision_plugin.convert_input(done)
