"""Hugging Face datasets on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ackd_lightning.data.custom import CustomImagesDataModule, say_test_is_validation, split_test
from ackd_lightning.data.decoding import Encoded
from ackd_lightning.data.folders import part_of
from ackd_lightning.data.labels import classes_of, read_labels, targets_of
from ackd_lightning.data.messages import say
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Records, Source, sample
from ackd_lightning.errors import ACKDError, first_line, first_names
from ackd_lightning.extras import require
from ackd_lightning.validation import checked

_PLACES = 256
"""Number of places at which a file of the dataset is read to tell it from others; all of it up to a megabyte."""
_LABELS = ("label", "labels", "fine_label", "target", "class")


class HuggingFaceDataModule(CustomImagesDataModule):
    """A dataset that ``datasets.Dataset.save_to_disk`` wrote, with a column of images and one of labels.

    Splits are taken by their names (``train``, ``validation``, ``test``); where there is one of the latter two, it is
    the test set; where there is none, a stratified fifth, always the same, is the test set. Nothing is downloaded.
    Needs the package ``datasets``: ``pip install 'ackd-lightning[datasets]'``.

    Args:
        root: Folder that ``save_to_disk`` wrote.
        image_column: Column with the images; None for the only one.
        label_column: Column with the labels; None for the only column of class labels, or the one that is named so.
        options: Arguments of `CustomImagesDataModule`, and those of
            [`ImageDataModule`][ackd_lightning.data.ImageDataModule].

    Raises:
        ACKDError: If the folder is not such a dataset, or a column is missing or ambiguous.
    """

    @checked
    def __init__(
        self, root: str | Path, *, image_column: str | None = None, label_column: str | None = None, **options: Any
    ) -> None:
        super().__init__(root, **options)
        self._splits = self._open()
        train = self._splits["train"]
        self._image = image_column or self._find_image(train)
        self._label = label_column or self._find_label(train)
        for argument, column in (("image_column", self._image), ("label_column", self._label)):
            for split in self._splits.values():
                if column not in split.column_names:
                    raise ACKDError(
                        f"{self.root} has no column {column!r} (it has {', '.join(split.column_names)}): set {argument}"
                    )
        names = getattr(train.features[self._label], "names", None)
        labels = {part: self._labels(part, names) for part in self._splits}
        index, found = classes_of(labels["train"], names, str(self.root), positions=True)
        self._targets = {
            part: targets_of(values, index, partial(self._place, part), train=part == "train")
            for part, values in labels.items()
        }
        self._has_validation = "val" in self._splits
        self._contents: dict[Part, str] = {}
        self._names = tuple(found)
        self.class_names = self._names
        self.num_classes = len(found)

    def _open(self) -> dict[str, Any]:
        datasets = require("datasets", "datasets", str(self.root))
        if not self.root.is_dir():
            raise ACKDError(f"there is no folder {self.root}: set root to a folder that save_to_disk wrote")
        try:
            found = datasets.load_from_disk(str(self.root))
        except Exception as error:  # a folder that is something else can fail in any way
            if empty := [path.parent for path in sorted(self.root.glob("**/state.json")) if _is_empty(path)]:
                raise ACKDError(f"the dataset {empty[0]} has no rows: save one with rows, or leave it out") from None
            reason = first_line(error, 300)
            raise ACKDError(
                f"{self.root} cannot be read as a dataset ({reason}): set root to a folder that save_to_disk wrote"
            ) from None
        if not isinstance(found, dict):
            return {"train": found}
        splits: dict[str, Any] = {}
        unread = []
        for name, split in found.items():
            part = part_of(str(name))
            if part is None or part in splits:
                unread.append(str(name))
            else:
                splits[part] = split
        if "train" not in splits:
            raise ACKDError(f"{self.root} has the splits {', '.join(found)} and none for training: name one train")
        if unread:
            say(f"splits of {self.root} that are not read: {first_names(unread)}")
        if "test" not in splits and "val" in splits:
            splits["test"] = splits.pop("val")
            say_test_is_validation(self.root, holds_out=not self.val_is_test)
        return splits

    def _find_image(self, split: Any) -> str:
        import datasets

        columns = [name for name, feature in split.features.items() if isinstance(feature, datasets.Image)]
        return self._only(columns, split, "columns of images", "image_column")

    def _find_label(self, split: Any) -> str:
        import datasets

        columns = [name for name, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)]
        if not columns:
            columns = [name for name in _LABELS if name in split.column_names][:1]
        return self._only(columns, split, "columns of class labels", "label_column")

    def _only(self, columns: Sequence[str], split: Any, what: str, option: str) -> str:
        if len(columns) != 1:
            raise ACKDError(
                f"{self.root} has {len(columns)} {what} among {', '.join(split.column_names)}: set {option} to one"
            )
        return str(columns[0])

    def _labels(self, part: str, names: Sequence[str] | None) -> list[Any]:
        """Labels of a split, by the numbers of the training split where both number their names."""
        split = self._splits[part]
        labels, own = read_labels(split[self._label], partial(self._place, part)), split.features[self._label]
        theirs = getattr(own, "names", None)
        if names is None and theirs is not None:
            say(
                f"the labels of the {part} split of {self.root} have names ({first_names(theirs)}) and those of the "
                "training split have none: equal numbers are taken for the same class"
            )
        if names is None or theirs is None or theirs == names:
            return labels
        numbers = {name: number for number, name in enumerate(names)}
        for row, label in enumerate(labels):
            if label is not None and theirs[label] not in numbers:
                raise ACKDError(
                    f"the class {theirs[label]!r} in {self._place(part, row)} is not one of the training split: "
                    "correct it, or leave the image out"
                )
        return [None if label is None else numbers[theirs[label]] for label in labels]

    def _place(self, part: str, row: int) -> str:
        return f"row {row} of the {part} split of {self.root}"

    def _marks_of(self, split: Any) -> tuple[str, str]:
        """Return ``mark`` and ``content`` of `Records`; the fingerprint is older than the images that are embedded."""
        own = f"{self._image} {split._fingerprint}"
        files = [Path(each["filename"]) for each in split.cache_files]
        found = [file.stat() for file in files]
        content = hashlib.sha256(b"".join(sample(file, _PLACES) for file in files)).hexdigest()
        sizes = [status.st_size for status in found]
        return f"{own} {sizes} {[status.st_mtime_ns for status in found]}", f"{own} {sizes} {content}"

    def _part_number(self, where: Part, rows: Tensor) -> int:
        """Return a hash of the dataset, since the order of its rows decides."""
        return int(hashlib.sha256(self._contents[where].encode()).hexdigest()[:15], 16)

    def _load(self, part: Part) -> Source:
        import datasets

        name = part if part in self._splits else "train"
        split, targets = self._splits[name], self._targets[name]
        mark, content = self._marks_of(split)
        self._contents[part] = content
        feature = split.features[self._image]
        try:
            split = split.select_columns([self._image]).cast_column(self._image, datasets.Image(decode=False))
        except (TypeError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise ACKDError(
                f"column {self._image!r} of {self.root} does not hold one image in each row, but {feature}: set "
                "image_column"
            ) from error
        if "test" not in self._splits:
            rows = split_test(targets, part, self.root, names=self._names)
            split, targets = split.select(rows.tolist()), targets[rows]
        reader = _Reader(split, self._image, f"{part} split of {self.root}")
        return self._read(Records(self.root, self._names, reader, targets, mark, content), self.root, part)


def _is_empty(state: Path) -> bool:
    """Whether a split was saved without rows, which the library does not read."""
    try:
        return not json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _Reader:
    """Function of a row that returns the encoded image there."""

    def __init__(self, split: Any, column: str, where: str) -> None:
        self.split, self.column, self.where = split, column, where

    def __call__(self, row: int) -> Encoded:
        value = self.split[row][self.column]
        if value is None:
            raise ACKDError(f"row {row} of the {self.where} has no image: remove it")
        path, content = value.get("path"), value.get("bytes")
        if content is None:
            try:
                content = Path(str(path)).read_bytes()
            except OSError as error:
                raise ACKDError(
                    f"row {row} of the {self.where} names the image {path}, which cannot be read ({error.strerror}): "
                    "save the dataset with its images embedded"
                ) from None
        return Encoded(f"row {row} of the {self.where}{f', {path}' if path else ''}", content)
