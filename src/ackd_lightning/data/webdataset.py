"""Data module for tar shards in the layout of WebDataset."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ackd_lightning.data.augmentation import ImageAugmentation
from ackd_lightning.data.cache import fingerprint, read_cache, save_cache
from ackd_lightning.data.custom import CustomImagesDataModule, say_shared
from ackd_lightning.data.datasets import IN_MEMORY
from ackd_lightning.data.decoding import Encoded, load_image
from ackd_lightning.data.labels import composed, refuse_ambiguous
from ackd_lightning.data.messages import say
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.pixels import is_deep, largest_value
from ackd_lightning.data.reading import Depth, check_depth
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.shards import ShardFormat, ShardLoader, Shards, expand, image_endings
from ackd_lightning.data.sources import Source
from ackd_lightning.errors import ACKDError, first_line, not_permitted
from ackd_lightning.extras import require
from ackd_lightning.types import Batch, height_width
from ackd_lightning.validation import Fraction, NonNegativeInt, PositiveInt, checked


class WebDatasetDataModule(CustomImagesDataModule):
    """Images in tar shards in the layout of WebDataset, streamed: for sets that no folder holds.

    A sample is an image file and a file with its label, of the same name (``000012.jpg``, ``000012.cls``).
    docs/scaling.md states what is exact: resuming with the same number of processes and workers is, but the batches
    depend on these numbers, and training images have no index, so methods with a row of memory for each image are
    refused. Needs the package ``webdataset``: ``pip install 'ackd-lightning[shards]'``.

    Args:
        root: Folder of the shards.
        train: Training shards in ``root``, with ``*`` or a range: ``train-{000..146}.tar``.
        test: Test shards.
        val: Validation shards; None needs ``val_fraction: 0``.
        num_classes: Number K of classes, whose labels are 0 to K - 1; None for as many as ``class_names``.
        class_names: Names of the classes; labels are these names, or their numbers from 0.
        label_key: Ending of the files with the labels.
        image_key: Ending of the files with the images, such as ``jpg`` beside ``mask.png``; None for the only one.
        buffer: Number of images that each worker shuffles among each other.
        val_fraction: 0 validates on the test shards, 1 on those of ``val``.
        options: Arguments of `CustomImagesDataModule`, and those of
            [`ImageDataModule`][ackd_lightning.data.ImageDataModule], without shares of the training part.

    Raises:
        ACKDError: If shards are missing, or the package is not installed.
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        *,
        train: str,
        test: str,
        val: str | None = None,
        num_classes: PositiveInt | None = None,
        class_names: list[str] | None = None,
        label_key: str = "cls",
        image_key: str | None = None,
        buffer: NonNegativeInt = 1000,
        val_fraction: Fraction = 1.0,
        **options: Any,
    ) -> None:
        self._has_validation = val is not None
        require("webdataset", "shards", f"the data set of shards in {root}")
        if val_fraction not in (0, 1) or (val is None and val_fraction):
            raise ACKDError(
                f"val_fraction is {val_fraction:g} and val is {val!r}: shards are not divided, so name shards with "
                "val, or set val_fraction to 0 to validate on the test shards"
            )
        super().__init__(root, val_fraction=val_fraction, **options)
        if self.train_fraction != 1 or self.max_per_class is not None:
            raise ACKDError(
                "train_fraction and max_per_class do not apply to shards, which are read whole: leave them out"
            )
        if self.sampling != "shuffle":
            raise ACKDError(
                f"sampling is {self.sampling} and the classes of streamed images are unknown before they are read: use "
                "shuffle"
            )
        if class_names is None and num_classes is None:
            raise ACKDError("the classes of the shards are unknown: set num_classes or class_names")
        if class_names is not None and num_classes not in (None, len(class_names)):
            raise ACKDError(
                f"num_classes is {num_classes} and class_names has {len(class_names)}: leave num_classes out"
            )
        patterns = {"train": train, "test": test, **({"val": val} if val is not None else {})}
        self._shards = {part: expand(self.root, pattern) for part, pattern in patterns.items()}
        for part in [each for each in patterns if each != "train"]:
            say_shared(part, [path.name for path in self._shards[part] if path in self._shards["train"]], "shard")
        self.num_classes = len(class_names) if class_names is not None else int(num_classes or 0)
        if self.num_classes < 2:
            raise ACKDError(f"num_classes is {self.num_classes}, and a classifier needs two classes")
        self._own_names = None if class_names is None else tuple(composed(class_names))
        refuse_ambiguous(self._own_names or (), f"the shards in {self.root}")
        self.class_names = self._own_names
        self.label_key = label_key.lstrip(".").lower()
        self.image_key = None if image_key is None else image_key.lstrip(".").lower()
        self.buffer = buffer
        self._counts: list[int] = []

    # ------------------------------------------------------------------------------------------------ shards

    def _load(self, part: Part) -> Source:
        raise NotImplementedError("shards are streamed")

    def image_names(self, part: Part) -> list[str] | None:
        """Return None: images in shards are not files.

        Args:
            part: ``train``, ``val`` or ``test``.
        """
        return None

    @property
    def train_targets(self) -> Tensor:
        """Nothing: the classes of streamed images are unknown before they are read."""
        raise AttributeError("train_targets")

    def prepare_data(self) -> None:
        """Count the images and check all shards, unless that was done before."""
        self._count()

    def setup(self, stage: str | None = None) -> None:
        """Count the images, and compare the numbers of shards, processes and images.

        Args:
            stage: Lightning's stage; ignored.

        Raises:
            ACKDError: If there are too few shards or images.
        """
        self.num_train_samples = sum(self._count())
        if self.val_is_test:
            self._say_unread_validation()
        world, _ = self._world()
        for part, shards in self._shards.items():
            if part != "train" and len(shards) < world:
                raise ACKDError(f"the {part} part has {len(shards)} shards for {world} processes: write more of them")
        if self.num_train_samples < self.batch_size:
            raise ACKDError(
                f"the training shards hold {self.num_train_samples:,} images, fewer than one batch of "
                f"{self.batch_size}: set batch_size to {max(1, self.num_train_samples)} or less"
            )

    def _form(self) -> ShardFormat:
        if self._deep is None:
            self._deep = _first_is_deep(self._shards["train"][0], self.image_key)
        names = self.class_names or ()
        order = {name: index for index, name in enumerate(names)}
        own = self._own_names or ()
        numbers = {str(number): order[own[number]] if own else number for number in range(self.num_classes)}
        crop = max(height_width(self.input_size)) > IN_MEMORY
        changes = self.augmentation.changes_images
        change = (
            ImageAugmentation(self.augmentation, self.mean, self.run_seed, deep=bool(self._deep)) if changes else None
        )
        return ShardFormat(
            self.image_format,
            crop,
            {**numbers, **order},
            self.label_key,
            self.image_key,
            change,
            self.augmentation.smallest_crop,
            None if self.augment == "none" else self._crop(),
        )

    def _count(self) -> list[int]:
        """Check all shards once, and return the number of images of each training shard."""
        if self._counts:
            return self._counts
        every = [path for shards in self._shards.values() for path in shards]
        names = "" if self._own_names is None else json.dumps(self._own_names)
        parts = {part: len(shards) for part, shards in self._shards.items()}  # of the paths, in this order
        read_as = ("counts of shards", parts, self.num_classes, names, self.label_key, self.image_key, self.value_range)
        mark = fingerprint(PathTable.of_paths(self.root, every), self.root, *read_as)
        cache = self.root / "ackd-checked-shards.pt" if self.cache else None
        content = None if cache is None else read_cache(cache, mark)
        if content is None:
            form, depths = self._form(), dict[str, Depth]()
            counts = {
                part: [_check_shard(each, form, depths) for each in paths] for part, paths in self._shards.items()
            }
            named = list(depths)
            note = check_depth([*depths.values()], form.image, str(self.root), lambda row: named[row])
            content = {"fingerprint": mark, "counts": counts["train"], "note": note}
            if cache is not None:
                save_cache(cache, content)
        if content["note"]:
            say(content["note"])
        self._counts = [int(each) for each in content["counts"]]
        return self._counts

    # ------------------------------------------------------------------------------------------------ loaders

    def _stream(self, part: str, *, batch_size: int, batches: int | None) -> ShardLoader:
        world, rank = self._world()
        paths = self._shards[part]
        workers = self.num_workers if part == "train" else min(self.num_workers, len(paths) // world)
        if workers < self.num_workers:
            say(f"{workers} workers instead of {self.num_workers} read the {len(paths)} shards of the {part} part")
        shards = Shards(
            [str(path) for path in paths],
            self._form(),
            batch_size=batch_size,
            batches=batches,
            counts=self._counts,
            seed=self.run_seed,
            place=(rank, world),
            buffer=self.buffer,
        )
        return ShardLoader(shards, num_workers=workers, pin_memory=self.pins_memory())

    def train_dataloader(self) -> Any:
        """Return the shuffled, resumable loader of the training shards; the last incomplete batch is left out."""
        if not self.num_train_samples:
            self.setup()
        size = self._own_batch_size()
        batches, rest = divmod(self.num_train_samples, self.batch_size)
        if rest and not self._told_rest:
            self._told_rest = True
            say(
                f"left out of each epoch: {rest:,} of {self.num_train_samples:,} training images, since batches of "
                "shards are always whole"
            )
        loader = self._stream("train", batch_size=size, batches=batches)
        loader.set_epoch(self._epoch())
        return loader

    def _eval_loader(self, part: Part) -> Any:
        name = "val" if part == "val" and not self.val_is_test else "test"
        return self._stream(name, batch_size=self.eval_batch_size, batches=None)

    def predict_dataloader(self) -> Any:
        """Refuse predictions, which name images by their index."""
        raise ACKDError(
            "images in shards have no index that predictions could name: unpack the test shards for predict"
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Augment and normalise on the device; training images have no index, and others have a number by their name.

        Args:
            batch: Batch of a loader, on the device.
            dataloader_idx: Number of the loader; ignored.
        """
        done = super().on_after_batch_transfer(batch, dataloader_idx)
        trained = isinstance(done, Batch) and getattr(batch, "first", None) is not None
        return done._replace(index=torch.full_like(done.index, -1)) if trained else done


def _first_is_deep(path: Path, key: str | None) -> bool:
    """Whether the first image of a shard, of this ending, has more than 8 bits; False for an unreadable shard."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                ending = member.name.rpartition("/")[2].partition(".")[2].lower()
                content = archive.extractfile(member) if image_endings([ending], key) else None
                if content is not None:
                    return is_deep(load_image(Encoded(member.name, content.read())))
    except (tarfile.TarError, OSError, EOFError, ValueError):
        return False  # `_check_shard` names what is wrong with it
    return False


def _check_shard(path: Path, form: ShardFormat, depths: dict[str, Depth]) -> int:
    """Return the number of samples of a shard whose files are whole, and whose labels are classes.

    Where the first image has more than 8 bits, images are decoded, and ``depths`` gets the depth of each by its name.
    """
    samples: list[tuple[str, list[str]]] = []  # neighbouring files of one name are a sample, as webdataset reads them
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isreg() or Path(member.name).name.startswith("."):
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, ending = file.partition(".")
                place = f"{folder}/{stem}".lstrip("/")
                if not samples or samples[-1][0] != place:
                    samples.append((place, []))
                if ending.lower() in samples[-1][1]:
                    raise ACKDError(
                        f"{place} in {path} has two files .{ending}: write the shard again, with a name of its own for "
                        "each image"
                    )
                samples[-1][1].append(ending.lower())
                content = archive.extractfile(member)
                assert content is not None
                if ending.lower() == form.label_key:
                    form.target(content.read(), f"{place} in {path}")
                elif form.image.deep and image_endings([ending.lower()], form.image_key):
                    name = f"{path}, {member.name}"
                    raw = load_image(Encoded(name, content.read()))
                    depths[name] = Depth(is_deep(raw), largest_value(raw))
                elif member.size:
                    content.seek(member.size - 1)
                    if len(content.read(1)) != 1:
                        raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, ACKDError):
            raise
        if isinstance(error, PermissionError):
            raise ACKDError(not_permitted(error)) from None
        reason = first_line(error, 300).strip(" -:")
        raise ACKDError(f"the shard {path} cannot be read ({reason}), perhaps it is cut off: write it again") from None
    if not samples:
        raise ACKDError(f"the shard {path} holds no samples: remove it")
    for place, endings in samples:
        chosen = image_endings(endings, form.image_key)
        if not chosen or form.label_key not in endings:
            what = f".{form.label_key} with its label" if chosen else "with its image"
            apart = sum(place == other for other, _ in samples) > 1
            raise ACKDError(
                f"{place} in {path} has no file {what} beside it (it has {', '.join(endings)}): write the shard again"
                f"{', with the files of each image next to each other' if apart else ''}"
            )
        form.image_ending(endings, f"{place} in {path}")
    return len(samples)
