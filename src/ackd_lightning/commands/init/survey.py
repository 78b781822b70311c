"""What a folder of photos holds: counts, sizes, formats, broken files and duplicates."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ackd_lightning.data.decoding import load_image
from ackd_lightning.data.folder import ImageFolderDataModule
from ackd_lightning.data.pixels import TWELVE_BITS, ImageFormat, bands, is_convertible, top_of
from ackd_lightning.data.reading import Depth, check_image_file, run_over
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Files
from ackd_lightning.errors import ACKDError

_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
_SMALL_FILE = 100_000
"""Bytes up to which a file is decoded whole; larger ones are checked by header and end marker, as a fit does."""
_MOST_TO_COMPARE = 4_000_000_000


class Photo(NamedTuple):
    """One image file.

    Attributes:
        side: Shorter side in pixels; 0 for a broken file.
        kind: Format, such as JPEG.
        grey: Whether it has no colours.
        depth: Bits of its pixels.
        problem: Why it cannot be read; empty if it can.
        channels: Number of channels of a whole image that is neither grey nor of colours; 0 for any other file.
    """

    side: int
    kind: str
    grey: bool
    depth: Depth
    problem: str = ""
    channels: int = 0


@dataclass(frozen=True)
class Survey:
    """What a folder holds.

    Attributes:
        class_names: Classes in the order of their indices.
        parts: Image files by part: ``train``, ``test``, and ``val`` where it has its own folder.
        split: Whether the test images are a fifth of the only folder.
        photos: What each file is, by path.
        shared: Pairs of equal files in two parts.
        contradicting: Pairs of equal files in two classes.
        repeated: Pairs of equal files of one part and class.
        compared: Whether files were compared.
    """

    class_names: tuple[str, ...]
    parts: Mapping[Part, Files]
    split: bool
    photos: Mapping[Path, Photo]
    shared: Sequence[tuple[Path, Path]]
    contradicting: Sequence[tuple[Path, Path]]
    repeated: Sequence[tuple[Path, Path]]
    compared: bool

    @functools.cached_property
    def good(self) -> list[Photo]:
        """Files that can be read."""
        return [each for each in self.photos.values() if not each.problem]

    @property
    def broken(self) -> list[Path]:
        """Files that cannot be read."""
        return [path for path, each in self.photos.items() if each.problem]

    @property
    def deeper(self) -> list[str]:
        """Folders inside the class folders, where all images lie in such folders and a class has several."""
        train = self.parts["train"]
        places = {path.relative_to(train.root).parent for path in train.paths}
        several = len(places) > len(self.class_names) and all(len(each.parts) > 1 for each in places)
        return sorted(each.as_posix() for each in places) if several else []

    @functools.cached_property
    def sides(self) -> tuple[int, int, int]:
        """Smallest, median and largest of the shorter sides."""
        sides = sorted(each.side for each in self.good)
        return sides[0], int(statistics.median(sides)), sides[-1]

    @functools.cached_property
    def readable(self) -> list[list[Path]]:
        """Training images of each class that can be read."""
        train = self.parts["train"]
        found: list[list[Path]] = [[] for _ in self.class_names]
        for path, label in zip(train.paths, train.targets.tolist(), strict=True):
            if not self.photos[path].problem:
                found[label].append(path)
        return found

    @property
    def counts(self) -> list[int]:
        """Number of training images of each class that can be read."""
        return list(map(len, self.readable))

    @property
    def formats(self) -> Counter[str]:
        """Number of files of each format."""
        return Counter(each.kind for each in self.good)

    @property
    def value_range(self) -> tuple[int, int] | None:
        """Values that become 0 and 1, for 16-bit files that use fewer bits; None for the range of the files' type."""
        values = [each.depth.largest for each in self.good if each.depth.largest is not None]
        whole = len(values) == len(self.good) and values and 0 < max(values) <= TWELVE_BITS
        return (0, top_of(max(values))) if whole else None


def survey(folder: str, **places: str | None) -> Survey:
    """Look at every file of a folder of class folders.

    Args:
        folder: Folder, as `ImageFolderDataModule` reads it.
        places: Its arguments ``train_dir``, ``val_dir`` and ``test_dir``.

    Raises:
        ACKDError: If the folder is not one of class folders, or no image can be read.
    """
    parts = ImageFolderDataModule(folder, **places).listed()
    train = parts["train"]
    if not (train.targets >= 0).all():
        raise ACKDError(f"{train.root} holds images without class folders; make one folder for each class")
    photos: dict[Path, Photo] = {}
    for part, files in parts.items():
        found = run_over(files, lambda row, files=files: _look(files.paths[row]), f"looking at {part}")  # type: ignore[misc]  # a default binds it
        photos.update(zip(files.paths, found, strict=True))
    seen = Survey(train.class_names, parts, train.root == parts["test"].root, photos, *_duplicates(parts))
    if empty := [name for name, count in zip(seen.class_names, seen.counts, strict=True) if not count]:
        raise _no_image(train, empty[0], photos)
    return seen


def _no_image(train: Files, name: str, photos: Mapping[Path, Photo]) -> ACKDError:
    """Say why a class has no training image: its files are broken, or have channels that need a configuration."""
    number = train.class_names.index(name)
    paths = [path for path, label in zip(train.paths, train.targets.tolist(), strict=True) if label == number]
    if other := next((path for path in paths if photos[path].channels), None):
        return ACKDError(
            f"{other} has {photos[other].channels} channels and ackd init is for grey and colour images, with or "
            "without transparency; write a configuration with data.channels, data.mean and data.std, as docs/data.md "
            "describes it for images of up to 16 channels"
        )
    return ACKDError(
        f"no training image of class {name} can be read ({photos[paths[0]].problem}); replace the files, or remove the "
        "class folder"
    )


def _look(path: Path) -> Photo:
    try:
        depth = check_image_file(path, ImageFormat((32, 32)))
        if path.suffix.lower() == ".npy":
            height, width = load_image(path).shape[:2]  # type: ignore[union-attr]  # an array
            return Photo(min(height, width), "npy", grey=False, depth=depth)
        with Image.open(path) as image:
            width, height = image.size
            kind, grey = image.format or path.suffix, image.mode in _GREY
        if path.stat().st_size <= _SMALL_FILE:
            load_image(path)
        return Photo(min(width, height), kind, grey, depth)
    except Exception as error:  # a damaged file can fail in any way
        return Photo(0, "", grey=False, depth=Depth(), problem=str(error), channels=_other_channels(path))


def _other_channels(path: Path) -> int:
    """Number of channels of a whole image that can become neither grey nor RGB; 0 for any other file."""
    with contextlib.suppress(Exception):  # a damaged file can fail in any way
        raw = load_image(path)
        return 0 if is_convertible(raw, 3, str(path)) else bands(raw, 3, str(path))
    return 0


def _duplicates(
    parts: Mapping[Part, Files],
) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]], list[tuple[Path, Path]], bool]:
    """Pairs of equal files in two parts, in two classes, and in neither; only files of the same size are read."""
    sizes: defaultdict[int, list[tuple[Path, Part, str]]] = defaultdict(list)
    for part, files in parts.items():
        for path, label in zip(files.paths, files.targets.tolist(), strict=True):
            if path.is_file():
                sizes[path.stat().st_size].append((path, part, files.class_names[label]))
    alike = {size: group for size, group in sizes.items() if size and len(group) > 1}
    if sum(size * len(group) for size, group in alike.items()) > _MOST_TO_COMPARE:
        return [], [], [], False
    same: defaultdict[bytes, list[tuple[Path, Part, str]]] = defaultdict(list)
    for group in alike.values():
        for entry in group:
            with contextlib.suppress(OSError):  # named among the broken files
                same[hashlib.blake2b(entry[0].read_bytes(), digest_size=16).digest()].append(entry)
    shared, contradicting, repeated = [], [], []
    for first, *others in same.values():
        for other in others:
            if other[1] != first[1]:
                shared.append((first[0], other[0]))
            if other[2] != first[2]:
                contradicting.append((first[0], other[0]))
            if other[1:] == first[1:]:
                repeated.append((first[0], other[0]))
    return shared, contradicting, repeated, True
