"""`ImageDataModule`: what every data module shares, from options and splits to augmentation on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import lightning.pytorch as L
import torch
from torch import Tensor

from ackd_lightning.data.augmentation import Augmentation
from ackd_lightning.data.datasets import EVAL_BORDER, IN_MEMORY
from ackd_lightning.data.loaders import ImageLoaders
from ackd_lightning.data.messages import say
from ackd_lightning.data.sampling import (
    Part,
    stratified_split,
    subset,
)
from ackd_lightning.data.sources import (
    Pixels,
    Source,
    new_positions,
    renumber,
    reorder,
    require_same_classes,
    say_without,
)
from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.types import DataInfo, check_scale
from ackd_lightning.validation import Fraction, NonNegativeInt, Positive, PositiveInt, Range, checked

_VAL_FRACTION = 0.1


def info_of(data: L.LightningDataModule) -> DataInfo:
    """Return what a data module tells about its data.

    Args:
        data: Data module with an attribute ``info``, as all of this package.

    Raises:
        ACKDError: If it has none.
    """
    info = getattr(data, "info", None)
    if not isinstance(info, DataInfo):
        found = "no attribute" if info is None else f"the {type(info).__name__}"
        raise ACKDError(
            f"{type(data).__name__} has {found} `info`; set it in the constructor of the data module, as in self.info ="
            " DataInfo(num_classes=10, input_size=32), or pass data=DataInfo(...) to the training module"
        )
    return info


class ImageDataModule(ImageLoaders):
    """Images and class indices for training, validation and test.

    A `training_step` receives a [`Batch`][ackd_lightning.types.Batch]: augmented and normalised float images on the
    training device, class indices, and positions in the training part. Works in any Lightning project.

    Images are augmented and normalised on the device, a batch at a time. Those of a small set are decoded once into one
    uint8 tensor. When the trainer runs on a GPU (CUDA or ROCm) and a part takes at most a quarter of the memory that is
    free there when its loader is made, every process keeps the part on its GPU until the run ends, and the loader
    returns only positions. Otherwise a batch is gathered in host memory and copied. Large images are decoded and
    cropped by worker processes and copied as uint8. The batches are the same every way.

    Validation is a stratified share of the training set, chosen by a hash of the index: it does not depend on the seed
    of the run. With ``val_fraction=0`` (the protocol of the papers) nothing is held out and `val_dataloader` reads the
    test set to show its progress; `val_is_test` is then true, and nothing may be selected on it.

    A subclass sets ``num_classes``, ``mean``, ``std`` and ``input_size`` and writes ``_load``. A constructor of its own
    takes ``**options`` and passes them on.

    Args:
        batch_size: Global training batch size: each of W processes takes ``batch_size / W``.
        eval_batch_size: Batch size of each process in validation, test and prediction.
        val_fraction: Share of the training set that is held out for validation; 0 holds nothing out, and validates on
            the test set. Without effect, which is said, on data with a validation part of their own.
        train_fraction: Share of each class of the training part that is used, for small runs.
        max_per_class: Largest number of training images of each class; None uses all.
        augmentation: Policy, erasing and mixing of training images besides crop and mirror image; none by default.
        sampling: Order of training images in an epoch: ``shuffle`` reads every image once; ``balanced`` reads images of
            all classes equally often, and repeats those of small classes.
        num_workers: Number of worker processes of each loader; results do not depend on it.
        mean: Mean of each channel, of pixels in 0 to 1, by which images are normalised; None for that of the data set.
            A pretrained student expects the one that it was trained with.
        std: Standard deviation of each channel, as ``mean``.
        seed: Seed of shuffling and augmentation; None takes the one of ``seed_everything`` (``PL_GLOBAL_SEED``), or 0.

    Attributes:
        num_classes: Number of classes of the data; the data set's full number until its files are found.
        mean: Mean of each channel, of pixels in 0 to 1.
        std: Standard deviation of each channel, of pixels in 0 to 1.
        input_size: Side of square images in pixels, or their height and width.
        channels: Number of channels of the images.
        class_names: Name of each class in the order of the targets; None while unknown.
        num_train_samples: Number of images in the training part, known after `setup`.
    """

    num_classes: int
    published_train_images: ClassVar[int | None] = None
    """Number of images of the whole training part; None where that depends on the files."""
    class_names: tuple[str, ...] | None = None
    num_train_samples: int = 0

    @checked
    def __init__(
        self,
        *,
        batch_size: PositiveInt = 128,
        eval_batch_size: PositiveInt = 256,
        val_fraction: Fraction = _VAL_FRACTION,
        train_fraction: Annotated[float, Range(0, 1, open_low=True)] = 1.0,
        max_per_class: PositiveInt | None = None,
        augmentation: Augmentation | None = None,
        sampling: Literal["shuffle", "balanced"] = "shuffle",
        num_workers: NonNegativeInt = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[Positive] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if len(mean or ()) != len(std or ()) or (mean is not None and len(mean) != self.channels):
            raise ACKDError(
                f"mean is {mean} and std is {std} in {type(self).__name__}: give both, with {self.channels} numbers "
                "each"
            )
        check_scale(mean, std, f" in {type(self).__name__}")
        if mean is not None and std is not None:
            self.mean, self.std = tuple(mean), tuple(std)
        # a checkpoint holds plain data, which comes back here
        given = Augmentation(**augmentation) if isinstance(augmentation, Mapping) else augmentation
        self.augmentation = given or Augmentation()
        self.sampling = sampling
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.train_fraction = train_fraction
        self.max_per_class = max_per_class
        self.num_workers = num_workers
        self.seed = seed
        if val_fraction == 1 and not self._own_validation:
            raise ACKDError(
                f"val_fraction is {val_fraction} in {type(self).__name__}, which leaves nothing to train on; "
                "it must be below 1"
            )
        self._order: tuple[str, ...] | None = None
        self._sources: dict[Part, Source] = {}
        self._rows: dict[Part, tuple[Part, Tensor]] = {}
        """The part that each one is read from, and its positions there."""
        self._held: dict[Part, tuple[Tensor, Tensor]] = {}
        self._marks: dict[str, list[int]] = {}
        self.as_trained = False
        """Whether `say_changed` has found in each part the images that a run was trained with."""

    # ------------------------------------------------------------------------------------- provided by each data set

    @abstractmethod
    def _load(self, part: Part) -> Source:
        """Read one part: decoded pixels of a small set, or the checked list of files of a large one.

        Called once for each part and process; ``"val"`` only if `_own_validation`.
        """

    def _fetch(self) -> None:
        """Download and unpack what is missing; called on one process of each machine."""

    @property
    def _own_validation(self) -> bool:
        """Whether the data set has a validation part of its own and it is used."""
        return False

    @property
    def _validation_share(self) -> float:
        """Share of the data set's own validation part that is used."""
        return self.val_fraction

    _has_validation = False
    """Whether the user's data have a validation part of their own."""

    def _say_unread_validation(self) -> None:
        if self._has_validation:
            say("val_fraction is 0: the validation part of the data is not read, and the test set shows the progress")

    def _split_keys(self, source: Source) -> Tensor | None:
        """Return what decides which images are held out or left out, ``N`` int64; None: their unchanging positions."""
        return None

    # ------------------------------------------------------------------------------------------------ what is known

    @property
    def info(self) -> DataInfo:
        """Number of classes, image size, normalisation and class names, as far as they are known."""
        return DataInfo(self.num_classes, self.input_size, self.mean, self.std, self.class_names, self.channels)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What evaluation does to an image before it is normalised, as plain data for the metadata of a weight file."""
        form, source = self.image_format, self._sources.get("train")
        whole = max(form.size) <= IN_MEMORY if source is None else isinstance(source, Pixels)
        return {
            "channels": form.channels,
            "interpolation": "bilinear",
            "crop_pct": 1.0 if whole else 1 / EVAL_BORDER,
            "value_range": form.value_range and list(form.value_range),
            "background": form.background,
            "pixels": "float32" if form.deep else "uint8",
        }

    @property
    def val_is_test(self) -> bool:
        """True when nothing is held out and `val_dataloader` reads the test set."""
        return self.val_fraction == 0

    def image_names(self, part: Part) -> list[str] | None:
        """Return the path of each image of a part, relative to the folder of the data, in the order of its loader.

        Args:
            part: ``train``, ``val`` or ``test``.

        Returns:
            Paths; None for images that are not files.
        """
        source, rows = self._part(part)
        names = source.names
        return None if names is None else [names[row] for row in rows.tolist()]

    @property
    def part_marks(self) -> dict[str, list[int]]:
        """Number of images of each part, and a number that changes with what decides the split.

        That is the sum of hashes of their names; empty where nothing about a file decides. Known after `setup`.
        """
        if self._rows and not self._marks:
            for part, (where, rows) in self._rows.items():
                if (number := self._part_number(where, rows)) is not None:
                    self._marks[part] = [len(rows), number]
        return self._marks

    def _part_number(self, where: Part, rows: Tensor) -> int | None:
        """Return a number that changes with what decides which images of a source are in a part; None for nothing."""
        keys = self._split_keys(self._sources[where])
        return None if keys is None else int(keys[rows].sum())

    def say_changed(self, before: Mapping[str, Sequence[int]]) -> str:
        """Say which parts have changed since a run was trained, and return the sentence; empty if none has.

        Args:
            before: `part_marks` of the run.
        """
        now = self.part_marks
        changed = [part for part in before if part in now and list(before[part]) != now[part]]
        self.as_trained = not changed and bool(before) and before.keys() == now.keys()
        if not changed:
            return ""
        counts = ", ".join(f"{part} part: {before[part][0]:,} then, {now[part][0]:,} now" for part in changed)
        words = f"the parts of the data are not those that the run was trained with ({counts})"
        if "train" in changed:
            words += ": some images that it has learned from may be in another part now, where they make the accuracy "
            words += "too high"
        say(words)
        return words

    def use_class_order(self, names: Sequence[str]) -> bool:
        """Give the classes the indices that they have in ``names``, such as those of a trained network.

        Targets and class names of all parts follow, also in loaders that exist already. While the class names are
        unknown, the order is kept and applied when `setup` reads the data.

        Args:
            names: All class names of the data in the wanted order.

        Returns:
            Whether the order of the classes changed; False while the class names are unknown.

        Raises:
            ACKDError: If the data have other classes; raised by `setup` while the class names are unknown.
        """
        order = tuple(names)
        if self.class_names is None:
            self._order = order
            return False
        positions = new_positions(self.class_names, order)
        changed = order != self.class_names
        self._order = self.class_names = order
        # In place, since the datasets of existing loaders share these tensors.
        for part, source in self._sources.items():
            self._sources[part] = replace(source, class_names=order)
            source.targets.copy_(renumber(source.targets, positions))
        for _, targets in self._held.values():
            targets.copy_(renumber(targets, positions.to(targets.device)))
        return changed

    # ------------------------------------------------------------------------------------------------ reading, splits

    def prepare_data(self) -> None:
        """Fetch, decode and check everything before training starts (one process of each machine)."""
        self._fetch()
        self._read_all()

    def setup(self, stage: str | None = None) -> None:
        """Split the data; the same on every process and for every stage.

        Args:
            stage: Lightning's stage; ignored, since all parts are memory-mapped or lists of files.

        Raises:
            ACKDError: If the data are not usable.
        """
        if self._rows:
            return
        self._read_all()
        train, test = self._sources["train"], self._sources["test"]
        everything = torch.arange(len(train.targets))
        labelled, unlabelled = everything[train.targets >= 0], everything[train.targets < 0]
        test_rows = torch.arange(len(test.targets))
        val_part: Part
        if self.val_is_test:
            train_rows, val_part, val_rows = labelled, "test", test_rows
            self._say_unread_validation()
        elif self._own_validation:
            val_part = "val"
            val_targets = self._sources["val"].targets
            train_rows, val_rows = labelled, torch.arange(len(val_targets))
            if self._validation_share < 1:
                val_rows = stratified_split(val_targets, self._validation_share)[1]
            elif self.val_fraction not in (_VAL_FRACTION, self._validation_share):
                say(
                    f"val_fraction {self.val_fraction:g} has no effect: the data have a validation part of their own, "
                    "which is read as it is"
                )
        else:
            val_part = "train"
            keys = self._split_keys(train)
            chosen = None if keys is None else keys[labelled]
            kept, held_out = stratified_split(train.targets[labelled], self.val_fraction, keys=chosen)
            train_rows, val_rows = labelled[kept], labelled[held_out]
            say_without(train.targets, val_rows, train.class_names, "the held-out validation part")
        if not len(val_rows):
            count = len(labelled) if val_part == "train" else len(self._sources[val_part].targets)
            share = f"val_fraction {self.val_fraction:g} of {count_of(count, 'labelled image')}"
            remedy = "make it larger, or 0" if count else "set it to 0"
            raise ACKDError(f"{share} leaves none for validation: {remedy} to validate on the test set")
        if self.train_fraction != 1 or self.max_per_class is not None:
            chosen = self._split_keys(train)
            train_rows = subset(train_rows, train.targets, self.train_fraction, self.max_per_class, chosen)
        train_rows = torch.cat([train_rows, unlabelled])
        self.num_train_samples = len(train_rows)
        self._rows = {"train": ("train", train_rows), "val": (val_part, val_rows), "test": ("test", test_rows)}

    def _read_all(self) -> None:
        parts: tuple[Part, ...] = ("train", "val", "test") if self._own_validation else ("train", "test")
        for part in parts:
            if part in self._sources:
                continue
            source = self._load(part)
            if not len(source.targets):
                raise ACKDError(f"the {part} part of {type(self).__name__} holds no images: check the data")
            train = self._sources.get("train")
            order = self._order if train is None else train.class_names
            if train is not None and set(source.class_names) != set(train.class_names):
                require_same_classes(train.class_names, source.class_names, "train", part)
            self._sources[part] = reorder(source, source.class_names if order is None else order)
        self.class_names = self._sources["train"].class_names
        self.num_classes = len(self.class_names)

    def _part(self, part: Part) -> tuple[Source, Tensor]:
        """Return the images that a part is read from, and its positions there; reads the data first."""
        if not self._rows:
            self.setup()
        where, rows = self._rows[part]
        return self._sources[where], rows
