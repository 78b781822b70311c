"""Images of one part of a data set, decoded or as files, with their classes."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ackd_lightning.data.decoding import Encoded, ImageFile
from ackd_lightning.data.messages import say
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.errors import ACKDError, first_names

NO_LABEL = -1
"""Target of an image without a label."""

_AT_ONCE = 1 << 12
"""Number of decoded images that are hashed at a time."""

_UNCOMPRESSED = frozenset({".bmp", ".dib", ".npy", ".pbm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff"})
_SAMPLE = 4096
"""Bytes that are read in each of three places of such a file."""


@dataclass(frozen=True)
class Files:
    """Labelled image files of one part of a data set.

    Attributes:
        root: Folder of the part, for messages.
        class_names: Name of each class; the position is the class index.
        paths: ``N`` image files.
        targets: ``N`` int64 class indices, -1 for an image without a label.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: PathTable
    targets: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, position: int) -> Path:
        """Return an image file.

        Args:
            position: Position of the image.
        """
        return self.paths[position]

    @property
    def names(self) -> tuple[str, ...]:
        """Paths relative to the folder of the part."""
        return self.paths.relative_to(self.root)

    def opener(self) -> Callable[[int], ImageFile]:
        """Return a function of the position of an image for worker processes."""
        return self.paths.bare().__getitem__

    def select(self, rows: Tensor) -> Files:
        """Return some of the files.

        Args:
            rows: ``M`` int64 positions.
        """
        return replace(self, paths=self.paths.select(rows), targets=self.targets[rows])


@dataclass(frozen=True)
class Records:
    """Labelled images of one part of a data set that are read from a table, each as the bytes of a file.

    Attributes:
        root: Folder of the table, for messages.
        class_names: Name of each class; the position is the class index.
        read: Function of the position of an image; it can be pickled.
        targets: ``N`` int64 class indices, -1 for an image without a label.
        mark: Text that changes with the images and the times of their files.
        content: Text that changes with the images, and is that of any copy of them.
    """

    root: Path
    class_names: tuple[str, ...]
    read: Callable[[int], Encoded]
    targets: Tensor
    mark: str = ""
    content: str = ""

    def __len__(self) -> int:
        return len(self.targets)

    def file(self, position: int) -> Encoded:
        """Return an image file.

        Args:
            position: Position of the image.
        """
        return self.read(position)

    @property
    def names(self) -> None:
        """Paths; images in a table have none."""

    def opener(self) -> Callable[[int], ImageFile]:
        """Return a function of the position of an image for worker processes."""
        return self.read


@dataclass(frozen=True)
class Pixels:
    """Decoded images of one part of a data set.

    Attributes:
        class_names: Name of each class; the position is the class index.
        images: ``N x C x H x W`` uint8, or float32 from 0 to 1.
        targets: ``N`` int64 class indices, -1 for an image without a label.
        names: Paths of the files, relative to the folder of the data; None for images that are not files.
        note: What was converted, in a sentence; empty for nothing.
    """

    class_names: tuple[str, ...]
    images: Tensor
    targets: Tensor
    names: tuple[str, ...] | None = None
    note: str = ""


Source = Files | Records | Pixels


def content_mark(source: Source) -> str:
    """Hash what the images of a part are: their decoded pixels, or the names and sizes of their files.

    Files of formats without compression have the same size whatever they show, so parts of their content count as well.

    A copy of the same data in another folder has the same mark.

    Args:
        source: Images.

    Raises:
        ACKDError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    if isinstance(source, Pixels):
        for start in range(0, len(source.images), _AT_ONCE):
            digest.update(source.images[start : start + _AT_ONCE].numpy().tobytes())
    elif isinstance(source, Files):
        digest.update(os.fsencode("\0".join(source.names)))
        digest.update(source.paths.stamps()[:, 0].tobytes())
        for row, name in enumerate(source.names):
            if os.path.splitext(name)[1].lower() in _UNCOMPRESSED:  # noqa: PTH122
                digest.update(sample(source.file(row)))
    else:
        digest.update(source.content.encode())
    return digest.hexdigest()


def sample(path: Path, places: int = 3) -> bytes:
    """Return some kilobytes from places of a file that are evenly spread from its beginning to its end.

    Args:
        path: File.
        places: Number of places, two or more.
    """
    last = max(0, path.stat().st_size - _SAMPLE)
    with path.open("rb") as file:
        found = []
        for start in sorted({last * number // (places - 1) for number in range(places)}):
            file.seek(start)
            found.append(file.read(_SAMPLE))
    return b"".join(found)


def name_keys(source: Source) -> Tensor | None:
    """Return a number for each image that depends on the name of its file alone, ``N`` int64.

    Systems that spell a name otherwise, with other separators or letters that are not composed, give the same number,
    and so do ``a/b`` and ``./a/b``.

    Args:
        source: Images.

    Returns:
        The numbers; None for images that are not files.
    """
    if source.names is None:
        return None
    names = (unicodedata.normalize("NFC", os.path.normpath(name).replace(os.sep, "/")) for name in source.names)
    digests = b"".join(hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return torch.from_numpy(np.frombuffer(digests, "<i8").astype(np.int64))


def say_without(targets: Tensor, rows: Tensor, names: Sequence[str], part: str) -> None:
    """Say which classes of the images have none in a part that was split off.

    Args:
        targets: ``N`` int64 class indices of all images, -1 without a label.
        rows: Positions of the part.
        names: Name of each class.
        part: What the part is called.
    """
    known = set(targets.tolist())
    missing = sorted((known - set(targets[rows].tolist())) - {NO_LABEL})
    if missing and len(rows):
        named = first_names(names[each] for each in missing)
        count = "1 class" if len(missing) == 1 else f"{len(missing):,} classes"
        say(f"{part} has no images of {count} with few images: {named}")


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
            parts.append(f"only in {name}: {first_names(names)}")
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
        raise ACKDError(
            f"the {len(class_names)} classes of the data are not the {len(order)} expected ones "
            f"({first_names([*wrong[:2], *missing, *wrong[2:]])}): use data with the same class names"
        )
    position = {name: number for number, name in enumerate(order)}
    return torch.tensor([position[name] for name in class_names], dtype=torch.int64)


def renumber(targets: Tensor, positions: Tensor) -> Tensor:
    """Return targets with other class indices; those of images without a label stay.

    Args:
        targets: ``N`` int64 class indices, -1 without a label.
        positions: ``K`` int64: new index of each class.
    """
    return torch.where(targets < 0, targets, positions[targets.clamp(min=0)])


def reorder(source: Source, order: Sequence[str]) -> Source:
    """Return a source with its classes in another order; images and files are shared, targets are new.

    Args:
        source: Images of one part.
        order: All class names in the wanted order.

    Raises:
        ACKDError: If ``order`` holds other names than the source.
    """
    positions = new_positions(source.class_names, order)
    return replace(source, class_names=tuple(order), targets=renumber(source.targets, positions))
