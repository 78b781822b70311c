"""Images of one part of a data set, decoded or as files of class folders, with their classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})

_SHOWN = 3
"""Class names that a message lists."""


@dataclass(frozen=True)
class Files:
    """Labelled image files of one part of a data set.

    Attributes:
        root: Folder of the part, for messages.
        class_names: Name of each class; the position is the class index.
        paths: ``N`` image files.
        targets: ``N`` int64 class indices.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    targets: Tensor

    def select(self, rows: Tensor) -> Files:
        """Return some of the files.

        Args:
            rows: ``M`` int64 positions.
        """
        paths = tuple(self.paths[row] for row in rows.tolist())
        return replace(self, paths=paths, targets=self.targets[rows])


@dataclass(frozen=True)
class Pixels:
    """Decoded images of one part of a data set.

    Attributes:
        class_names: Name of each class; the position is the class index.
        images: ``N x 3 x S x S`` uint8.
        targets: ``N`` int64 class indices.
    """

    class_names: tuple[str, ...]
    images: Tensor
    targets: Tensor


Source = Files | Pixels


def image_files(folder: Path) -> list[Path]:
    """List the images in ``folder`` and below, sorted by path, without hidden files."""
    found: list[Path] = []
    for place, _, names in os.walk(folder, followlinks=True):
        here = Path(place)
        found += [here / n for n in names if not n.startswith(".") and os.path.splitext(n)[1].lower() in EXTENSIONS]  # noqa: PTH122
    return sorted(found)


def class_folders(path: Path) -> list[Path]:
    """List the folders directly below ``path``, sorted by name, without hidden ones."""
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def scan_class_folders(path: Path, *, keep: Iterable[str] | None = None, remedy: str = "") -> Files:
    """List the images of a folder of class folders; the class index is the position in the sorted folder names.

    Args:
        path: Folder that holds one folder for each class.
        keep: Names of the classes to list; None lists all of them.
        remedy: Remedy for a wrong layout, added to the messages.

    Returns:
        The files, sorted by class and then by path.

    Raises:
        ACKDError: If the folder is missing, has no class folders, or a class folder holds no image.
    """
    hint = remedy or "make one folder for each class and put its images there"
    if not path.is_dir():
        raise ACKDError(f"there is no folder {path}: {hint}")
    folders = class_folders(path)
    if keep is not None:
        wanted = frozenset(keep)
        folders = [folder for folder in folders if folder.name in wanted]
    if not folders:
        loose = len(image_files(path))
        what = f"{loose:,} images but no class folders" if loose else "neither images nor class folders"
        raise ACKDError(f"{path} holds {what}: {hint}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = image_files(folder)
        if not files:
            raise ACKDError(f"the class folder {folder} holds no images: add some or delete the folder")
        paths += files
        labels += [label] * len(files)
    return Files(path, tuple(folder.name for folder in folders), tuple(paths), torch.tensor(labels))


def require_same_classes(train: Sequence[str], test: Sequence[str], train_name: str, test_name: str) -> None:
    """Refuse two parts with different classes.

    Args:
        train: Class names of the training part.
        test: Class names of the other part.
        train_name: Name of the training part, for the message.
        test_name: Name of the other part, for the message.

    Raises:
        ACKDError: If the names or their order differ; it lists the first differing names.
    """
    if tuple(train) == tuple(test):
        return
    parts = []
    for name, mine, other in ((train_name, train, test), (test_name, test, train)):
        if names := sorted(set(mine) - set(other)):
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"only in {name}: {', '.join(names[:_SHOWN])}{more}")
    raise ACKDError(
        f"training and test classes differ ({'; '.join(parts) or 'another order'}): both need the same class folders"
    )


def new_positions(class_names: Sequence[str], order: Sequence[str]) -> Tensor:
    """Return the index of each class in another order of the same names.

    Args:
        class_names: ``K`` class names of the data.
        order: The same names in the wanted order.

    Returns:
        ``K`` int64: entry k is the position of ``class_names[k]`` in ``order``.

    Raises:
        ACKDError: If the names are not the same; it lists up to three differing names.
    """
    if sorted(class_names) != sorted(order):
        wrong = [f"{name!r} is given twice" for name, count in Counter(order).items() if count > 1]
        wrong += [f"{name!r} is not in the data" for name in dict.fromkeys(order) if name not in set(class_names)]
        missing = [f"{name!r} is only in the data" for name in class_names if name not in set(order)]
        shown = (wrong[: _SHOWN - 1] + missing + wrong[_SHOWN - 1 :])[:_SHOWN]
        more = len(wrong) + len(missing) - len(shown)
        raise ACKDError(
            f"the {len(class_names)} classes of the data are not the {len(order)} expected ones "
            f"({', '.join(shown)}{f' and {more} more' if more else ''}): use data with the same class names"
        )
    position = {name: number for number, name in enumerate(order)}
    return torch.tensor([position[name] for name in class_names], dtype=torch.int64)


def reorder(source: Source, order: Sequence[str]) -> Source:
    """Return a source with its classes in another order; images and files are shared, targets are new.

    Args:
        source: Images of one part.
        order: All class names in the wanted order.

    Raises:
        ACKDError: If ``order`` holds other names than the source.
    """
    positions = new_positions(source.class_names, order)
    return replace(source, class_names=tuple(order), targets=positions[source.targets])
