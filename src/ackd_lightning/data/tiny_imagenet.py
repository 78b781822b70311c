"""Tiny-ImageNet in its official layout.

Source: Stanford CS231n; http://cs231n.stanford.edu/tiny-imagenet-200.zip
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ackd_lightning.data.custom import Side
from ackd_lightning.data.download import Archive, DownloadedDataModule, extract
from ackd_lightning.data.folders import class_folders, class_names_of, scan_class_folders
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Files, Pixels
from ackd_lightning.data.stored import ROOT
from ackd_lightning.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ackd_lightning.data.walk import image_files
from ackd_lightning.errors import ACKDError
from ackd_lightning.validation import checked

_ANNOTATIONS = "val_annotations.txt"


class TinyImageNetDataModule(DownloadedDataModule):
    """Tiny-ImageNet: 100,000 training and 10,000 validation images of 64 x 64 in 200 classes.

    The test set is the official ``val`` folder (the official test images have no labels), either in its original form,
    with its labels in ``val_annotations.txt``, or sorted into class folders. ``train`` may hold some of the class
    folders; images of other classes in ``val`` are left out where the official ``wnids.txt`` or annotations exist.

    The images are kept in memory, and augmented by zero-padded crop and mirror image.

    Args:
        root: Folder ``tiny-imagenet-200``, or the one that holds it or its archive.
        image_size: Side in pixels to which the images are resized.
        options: Arguments of `DownloadedDataModule` and of [`ImageDataModule`][ackd_lightning.data.ImageDataModule].
    """

    num_classes = 200
    published_train_images = 100_000
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    input_size = 64
    archive = Archive(
        name="Tiny-ImageNet",
        url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        filename="tiny-imagenet-200.zip",
        md5="90528d7ca1a48142e341f4ef8d21d0de",
        size=248_100_043,
    )

    @checked
    def __init__(self, root: str | Path = ROOT, *, image_size: Side = 64, **options: Any) -> None:
        super().__init__(root, **options)
        self.input_size = image_size

    def _class_place(self) -> Path:
        return self._place() / "train"

    def _place(self) -> Path:
        return self.root if (self.root / "train").is_dir() else self.root / "tiny-imagenet-200"

    def _fetch(self) -> None:
        place = self._place()
        if not (place / "train").is_dir():
            extract(self._archive_file(), place)

    def _load(self, part: Part) -> Pixels:
        place = self._place()
        remedy = f"unpack the official {self.archive.filename} and keep its folders train and val"
        if part == "train":
            return self._decoded(scan_class_folders(place / "train", remedy=remedy), place, part)
        names, val = class_names_of(place / "train"), place / "val"
        if (val / _ANNOTATIONS).is_file():
            return self._decoded(annotated(val, names), place, part)
        if val.is_dir() and {folder.name for folder in class_folders(val)} <= {"images"}:
            raise ACKDError(
                f"{val} holds {len(image_files(val)):,} images but neither {_ANNOTATIONS} nor class folders, so their "
                f"classes are unknown: put the official {_ANNOTATIONS} there"
            )
        others: Literal["refuse", "skip"] = "skip" if (place / "wnids.txt").is_file() else "refuse"
        found = scan_class_folders(val, classes=names, others=others, remedy=remedy)
        return self._decoded(found, place, part)


def annotated(val: Path, class_names: tuple[str, ...]) -> Files:
    """List the images of the official ``val`` folder whose class is in ``class_names``.

    Args:
        val: Folder with ``images/`` and ``val_annotations.txt`` (file name and class, separated by tabs).
        class_names: Names of the classes to list, in the order of their indices.

    Raises:
        ACKDError: If a line cannot be read, an image is missing, or a class has no image.
    """
    source = val / _ANNOTATIONS
    images = val / "images"
    label_of = {name: label for label, name in enumerate(class_names)}
    chosen: list[tuple[int, Path]] = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        if len(fields) < 2:
            raise ACKDError(
                f"line {number} of {source} is {line[:60]!r}, not a file name, a tab and a class: "
                "put the official file back"
            )
        if fields[1].strip() in label_of:
            chosen.append((label_of[fields[1].strip()], images / fields[0].strip()))
    present = {path.name for path in image_files(images)} if images.is_dir() else set()
    missing = [path for _, path in chosen if path.name not in present]
    if missing:
        raise ACKDError(
            f"{len(missing):,} images of {source} are missing, the first is {missing[0]}: unpack the archive again"
        )
    labels = [label for label, _ in chosen]
    empty = [name for name, label in label_of.items() if label not in set(labels)]
    if empty:
        raise ACKDError(
            f"{source} names no image of {len(empty)} training classes, the first is {empty[0]}: training and test "
            "need the same classes"
        )
    return Files(val, class_names, PathTable.of_paths(val, [path for _, path in chosen]), torch.tensor(labels))
