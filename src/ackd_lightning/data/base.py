"""What every data module shares: options, splits, loaders, and augmentation on the device."""

from __future__ import annotations

import inspect
import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor

from ackd_lightning.data.augment import Keys, RawBatch, crop_flip, normalise
from ackd_lightning.data.datasets import FileImages, HeldImages, TensorImages
from ackd_lightning.data.images import (
    Files,
    Pixels,
    cached,
    check_files,
    class_folders,
    decode,
    fingerprint,
    require_same_classes,
)
from ackd_lightning.data.sampling import (
    EpochSampler,
    ImageLoader,
    Part,
    ResumableLoader,
    as_is,
    stratified_split,
    subset,
)
from ackd_lightning.errors import ACKDError
from ackd_lightning.types import Batch

Source = Files | Pixels

# The common defaults, here once for the constructors of all data modules.
ROOT = "data"
BATCH_SIZE = 128
EVAL_BATCH_SIZE = 256
VAL_FRACTION = 0.1

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_HELD_SHARE = 0.25
"""Share of a GPU's free memory that the images of one part may take."""
_COPY = 4096
"""Images that go to the device at once, so that host memory never holds a second copy of all."""


class ImageDataModule(L.LightningDataModule):
    """Images and class indices for training, validation and test.

    A `training_step` receives a [`Batch`][ackd_lightning.types.Batch]: augmented and normalised float images on the
    training device, class indices, and positions in the training part. Works in any Lightning project.

    Images are augmented and normalised on the device, a batch at a time. Those of a small set are decoded once into one
    uint8 tensor. When the trainer runs on a GPU (CUDA or ROCm) and a part takes at most a quarter of the memory that is
    free there when its loader is made, the part is kept on the GPU until the run ends, each process on its own, and the
    loader hands out only the keys to gather by. Otherwise a batch is gathered in host memory and copied. Large images
    are decoded and cropped by worker processes and copied as uint8. The batches are the same every way.

    Validation is a stratified share of the training set, chosen by a hash of the index: it does not depend on the seed
    of the run. With ``val_fraction=0`` (the protocol of the papers) nothing is held out and `val_dataloader` reads the
    test set, so that it can be looked at; `val_is_test` says so, and nothing may be selected on it.

    Args:
        root: folder of the data.
        batch_size: global training batch: each of W processes takes ``batch_size / W``.
        eval_batch_size: batch of each process in validation, test and prediction.
        val_fraction: share of the training set that is held out for validation; 0 holds nothing out.
        train_fraction: share of each class of the training part that is used, for small runs.
        max_per_class: at most so many training images of each class.
        num_workers: worker processes of each loader; results do not depend on it.
        seed: seed of shuffling and augmentation; by default the one of ``seed_everything`` (``PL_GLOBAL_SEED``), or 0.
        cache: keep decoded images as a file next to the data.

    Attributes:
        num_classes: number of classes that are there; the data set's full number until its files are found.
        mean: mean of each colour channel, of pixels in 0 to 1.
        std: standard deviation of each colour channel.
        input_size: height and width in pixels.
        class_names: names of the classes once known, else empty.
        num_train_samples: images in the training part, known after `setup`.
    """

    num_classes: int
    published_train_images: ClassVar[int | None] = None
    """Images of the whole training part; None where that depends on the files."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_size: int
    class_names: tuple[str, ...] = ()
    num_train_samples: int = 0

    augment: Literal["crop_flip", "crop", "none"] = "crop_flip"
    """Augmentation of images in memory: zero-padded crop and mirror image, crop alone, or nothing."""

    def __init__(
        self,
        root: str | Path = ROOT,
        *,
        batch_size: int = BATCH_SIZE,
        eval_batch_size: int = EVAL_BATCH_SIZE,
        val_fraction: float = VAL_FRACTION,
        train_fraction: float = 1.0,
        max_per_class: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        cache: bool = True,
    ) -> None:
        super().__init__()
        # Plain data only, so that checkpoints load safely; and only what the data set's own constructor takes.
        known = inspect.signature(type(self)).parameters
        self.save_hyperparameters(ignore=["root", *({"cache"} - set(known))], logger=False)
        if "root" in known:
            self.save_hyperparameters({"root": str(root)}, logger=False)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ACKDError(f"{name} is {value}: use {least} or more")
        nothing = torch.zeros(0, dtype=torch.int64)
        self._check_val_fraction(val_fraction)
        subset(nothing, nothing, train_fraction, max_per_class)
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.train_fraction = train_fraction
        self.max_per_class = max_per_class
        self.num_workers = num_workers
        self.seed = seed
        self.cache = cache
        self._sources: dict[Part, Source] = {}
        self._rows: dict[Part, tuple[Source, Tensor]] = {}
        self._held: dict[Part, tuple[Tensor, Tensor]] = {}
        place = self._class_place()
        if place is not None and (there := class_folders(place)):
            self.num_classes = len(there)

    # ------------------------------------------------------------------------------------ what a data set fills in

    def _class_place(self) -> Path | None:
        """Folder of the training classes' folders, where a subset of them is a valid data set; else None."""
        return None

    @abstractmethod
    def _load(self, part: Part) -> Source:
        """Read one part: decoded pixels of a small set, or the checked list of files of a large one.

        Called once for each part and process; ``"val"`` only if `_own_validation`.
        """

    def _fetch(self) -> None:
        """Download and unpack what is missing; called on one process of each machine."""

    @property
    def _own_validation(self) -> bool:
        """Whether a validation part of its own comes with the data set and is used."""
        return False

    def _check_val_fraction(self, val_fraction: float) -> None:
        """Raise an `ACKDError` for a share that makes no sense here."""
        stratified_split(torch.zeros(0, dtype=torch.int64), val_fraction)

    # ------------------------------------------------------------------------------------------- helpers for those

    def _cache_file(self, folder: Path, part: str) -> Path | None:
        return folder / f"ackd-cache-{part}-{self.input_size}px.pt" if self.cache else None

    def _decoded(self, files: Files, folder: Path, part: Part) -> Pixels:
        """Decode small images, or take them from the cache in ``folder``."""
        mark = fingerprint(files.paths, files.root, self.input_size, files.class_names)
        return cached(self._cache_file(folder, part), mark, lambda: decode(files, self.input_size))

    def _checked(self, files: Files, folder: Path, part: Part) -> Files:
        """Look for broken files, once."""
        check_files(files, folder / f"ackd-checked-{part}.pt" if self.cache else None)
        return files

    # -------------------------------------------------------------------------------------------------- the module

    @property
    def val_is_test(self) -> bool:
        """True when nothing is held out and `val_dataloader` reads the test set."""
        return self.val_fraction == 0

    @property
    def run_seed(self) -> int:
        """Seed of shuffling and augmentation."""
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    @property
    def train_targets(self) -> Tensor:
        """``N`` int64 class of every training image by ``Batch.index``; known after ``setup``."""
        source, rows = self._rows["train"]
        return source.targets[rows]

    def prepare_data(self) -> None:
        """Fetch, decode and check everything before training starts (one process of each machine)."""
        self._fetch()
        self._read_all()

    def setup(self, stage: str | None = None) -> None:
        """Split the data; the same on every process and for every stage.

        Args:
            stage: Lightning's stage, not looked at: all parts are memory-mapped or lists of files.

        Raises:
            ACKDError: if the data are not usable, or too few for one batch.
        """
        if self._rows:
            return
        self._read_all()
        train, test = self._sources["train"], self._sources["test"]
        everything = torch.arange(len(train.targets))
        test_rows = torch.arange(len(test.targets))
        if self.val_is_test:
            train_rows, val_source, val_rows = everything, test, test_rows
        elif self._own_validation:
            val_source = self._sources["val"]
            train_rows, val_rows = everything, torch.arange(len(val_source.targets))
            if self.val_fraction < 1:
                val_rows = stratified_split(val_source.targets, self.val_fraction)[1]
        else:
            val_source = train
            train_rows, val_rows = stratified_split(train.targets, self.val_fraction)
        if not len(val_rows):
            raise ACKDError(
                f"val_fraction {self.val_fraction:g} of {len(val_source.targets):,} images leaves none for validation: "
                "make it larger, or 0 to look at the test set instead"
            )
        train_rows = subset(train_rows, train.targets, self.train_fraction, self.max_per_class)
        if len(train_rows) < self.batch_size:
            raise ACKDError(
                f"the training part holds {len(train_rows):,} images, fewer than one batch of {self.batch_size}: "
                f"set batch_size to {max(1, len(train_rows))} or less, or use more of the data"
            )
        self.num_train_samples = len(train_rows)
        self._rows = {"train": (train, train_rows), "val": (val_source, val_rows), "test": (test, test_rows)}

    def _read_all(self) -> None:
        parts: tuple[Part, ...] = ("train", "val", "test") if self._own_validation else ("train", "test")
        for part in parts:
            if part not in self._sources:
                self._sources[part] = self._load(part)
            source = self._sources[part]
            if not len(source.targets):
                raise ACKDError(f"the {part} part of {self.root} holds no images: check the path and the download")
            require_same_classes(self._sources["train"].class_names, source.class_names, "train", part)
        self.class_names = self._sources["train"].class_names
        self.num_classes = len(self.class_names)

    # ------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, without the incomplete last batch, resumable in the middle of an epoch."""
        world, rank = self._world()
        if self.batch_size % world:
            raise ACKDError(
                f"batch_size {self.batch_size} does not divide by {world} processes: it is the global batch, "
                f"so use a multiple of {world}"
            )
        dataset = self._dataset("train")
        sampler = EpochSampler(dataset, num_replicas=world, rank=rank, seed=self.run_seed)
        if self.trainer is not None:
            # Lightning calls set_epoch only after workers have started (#21938): a resumed run would replay epoch 0.
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)
        return ResumableLoader(
            dataset, batch_size=self.batch_size // world, sampler=sampler, drop_last=True, **self._options(dataset)
        )

    def val_dataloader(self) -> ImageLoader:
        """The validation part in order; the test set when `val_is_test`."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ImageLoader:
        """The test set in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """The test set in order."""
        return self._eval_loader("test")

    def _eval_loader(self, part: Part) -> ImageLoader:
        world, rank = self._world()
        dataset = self._dataset(part)
        sampler = None
        if world > 1:
            if len(dataset) < world:
                raise ACKDError(
                    f"the {part} part holds {len(dataset)} images for {world} processes: use fewer processes"
                )
            # Lightning's own would repeat samples to make the ranks even, and so count some of them twice.
            sampler = UnrepeatedDistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=False)
        return ImageLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._options(dataset))

    def _options(self, dataset: TensorImages | FileImages | HeldImages) -> dict[str, Any]:
        """What all loaders share; keys are no work for other processes, and too few to pin."""
        if isinstance(dataset, HeldImages):
            return {"collate_fn": as_is}
        return {"num_workers": self.num_workers, "collate_fn": as_is, "pin_memory": torch.cuda.is_available()}

    def _world(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _dataset(self, part: Part) -> TensorImages | FileImages | HeldImages:
        if not self._rows:
            self.setup()
        source, rows = self._rows[part]
        if isinstance(source, Pixels):
            if self._hold(len(rows) * source.images[0].nbytes):
                return HeldImages(part, len(rows))
            return TensorImages(source.images, source.targets, rows)
        return FileImages(source.paths, source.targets, rows, size=self.input_size, seed=self.run_seed)

    # --------------------------------------------------------------------------------------------------- the device

    def _hold(self, size: int) -> bool:
        """Whether the trainer's device is to hold ``size`` bytes of images, rather than be sent them by the batch."""
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return device.type == "cuda" and size <= _HELD_SHARE * torch.cuda.mem_get_info(device)[0]

    def _gather(self, keys: Keys) -> RawBatch:
        """Look up a batch in the part's images and targets on the keys' device, which are copied there at first."""
        device = keys.index.device
        if keys.part not in self._held or self._held[keys.part][0].device != device:
            source, rows = self._rows[keys.part]
            assert isinstance(source, Pixels)
            images = torch.empty(len(rows), *source.images.shape[1:], dtype=torch.uint8, device=device)
            for start in range(0, len(rows), _COPY):
                images[start : start + _COPY] = source.images[rows[start : start + _COPY]]
            self._held[keys.part] = images, source.targets[rows].to(device)
        images, targets = self._held[keys.part]
        return RawBatch(images[keys.index], targets[keys.index], keys.index, keys.epoch)

    def teardown(self, stage: str | None = None) -> None:
        """Free what the device holds.

        Args:
            stage: Lightning's stage, not looked at.
        """
        self._held.clear()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment and normalise on the device, after gathering there what it holds.

        Args:
            batch: what the loader gave, on the device; anything but `RawBatch` and `Keys` passes through.
            dataloader_idx: not looked at.
        """
        if isinstance(batch, Keys):
            batch = self._gather(batch)
        if not isinstance(batch, RawBatch):
            return batch
        image = batch.image
        # On a GPU, asking whether there is anything to do would cost more than doing it.
        if self.augment != "none" and (image.is_cuda or bool((batch.epoch >= 0).any())):
            pad = self.input_size // 8  # 4 pixels at 32, 8 at 64
            image = crop_flip(batch, pad=pad, flip=self.augment == "crop_flip", seed=self.run_seed)
        done = Batch(normalise(image, self.mean, self.std), batch.target, batch.index)
        # Under true half precision the trainer has converted the batch before it was float: do it now.
        return done if self.trainer is None else self.trainer.precision_plugin.convert_input(done)
