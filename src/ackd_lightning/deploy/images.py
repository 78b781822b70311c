"""Images to predict: found in folders, files and tables, decoded by worker processes; those that cannot be read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ackd_lightning.data.decoding import load_image
from ackd_lightning.data.messages import say
from ackd_lightning.data.pixels import TWELVE_BITS, bands, bits, convert, is_convertible, is_deep, largest_value
from ackd_lightning.data.table import read_columns
from ackd_lightning.data.walk import Walk, extensions
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.errors import ACKDError, count_of, first_line

_TABLES = frozenset({".csv", ".tsv", ".parquet", ".pq"})
_COLUMNS = ("path", "file", "image", "filename", "file_name")
"""Names of the column with the paths of images, the first that a table has."""
_WORTH_WORKERS = 256
"""Number of images from which worker processes pay off."""
_IN_TRAINING = re.compile(r": (replace them, or )?set value_range .*")
"""A remedy that is a setting of the training."""


class Listed(NamedTuple):
    """An image file to predict.

    Attributes:
        name: Name in the predictions: the path below a folder, and elsewhere the path as it was given.
        path: File.
    """

    name: str
    path: Path


def list_images(places: Sequence[str]) -> list[Listed]:
    """List the images that folders, files and tables name, in that order.

    Images in a folder and below are sorted by path; what else is in it is passed over, with a line. The paths in a
    table (CSV, TSV or Parquet) are relative to its folder and are taken from its column ``path``, ``file``, ``image``,
    ``filename`` or ``file_name``. A path that a table names and that does not exist is listed, too.

    Args:
        places: Folders, image files and tables.

    Raises:
        ACKDError: If a place does not exist, or there are no images at all.
    """
    found: list[Listed] = []
    folders = [place for place in places if Path(place).is_dir()]
    for place in places:
        path = Path(place)
        if path.is_dir():
            walk = Walk()
            prefix = Path(place) if len(folders) > 1 else Path()  # else two folders could have the same names
            found += [Listed((prefix / each.relative_to(path)).as_posix(), each) for each in walk.images(path)]
            walk.report(path)
        elif not path.is_file():
            problem = "is a pipe or a device" if path.exists() else "does not exist"
            raise ACKDError(f"--images {place} {problem}; name a folder, image files or a table")
        elif path.suffix.lower() in _TABLES:
            found += _of_table(path)
        else:
            found.append(Listed(place, path))
    if not found:
        raise ACKDError(f"--images {' '.join(places)} holds no images; name a folder, image files or a table with some")
    return found


def _of_table(table: Path) -> list[Listed]:
    names: list[str] = []

    def choose(there: Sequence[str]) -> Sequence[str]:
        names.extend(filter(None, there))
        usual = [name for name in _COLUMNS if name in names]
        return usual[:1] or (names if len(names) == 1 else [])

    content = read_columns(table, choose)
    if len(names) == 1 and (Path(names[0]).suffix.lower() in extensions() or (table.parent / names[0]).is_file()):
        say(f"{table} has no line with column names: its first line, {names[0]}, is an image")
        content = {_COLUMNS[0]: [names[0], *content[names[0]]]}
        names = [_COLUMNS[0]]
    column = next((name for name in _COLUMNS if name in names), names[0] if len(names) == 1 else None)
    if column is None:
        raise ACKDError(
            f"{table} has the columns {', '.join(names) or '(none)'} and none with paths; call it {_COLUMNS[0]}"
        )
    paths = [str(each or "").strip() for each in content[column]]
    if "" in paths:
        raise ACKDError(f"row {paths.index('') + 1} of {table} has no path in column {column!r}; add it")
    return [Listed(each, table.parent / each) for each in paths]


@dataclass
class Notes:
    """What happened to images that were not as the network reads them.

    Attributes:
        unreadable: Name of each file that was skipped, and why.
        converted: Number of images by their number of channels, where it is not the network's.
        dark: Number of 16-bit images none of whose values needs more than 12 bits.
    """

    unreadable: list[tuple[str, str]] = field(default_factory=list)
    converted: Counter[int] = field(default_factory=Counter)
    dark: int = 0

    def lines(self, channels: int) -> list[str]:
        """Return a line for each kind of conversion.

        Args:
            channels: Number of channels that the network reads.
        """
        found = []
        if self.converted:
            kinds = ", ".join(
                f"{count_of(count, 'image')} with {count_of(number, 'channel')}"
                for number, count in sorted(self.converted.items())
            )
            how = "grey" if channels == 1 else "RGB" if channels == 3 else count_of(channels, "channel")
            found.append(f"made {how}, which the network reads: {kinds}")
        if self.dark:
            found.append(
                f"images of 16 bits that use at most 12, and so look black to the network: {self.dark:,}; scale them"
            )
        return found


class _Decoded(NamedTuple):
    """What a worker returns for one file."""

    row: int
    pixels: Tensor | None
    problem: str = ""
    converted: int = 0
    dark: bool = False


class _ImageFiles(Dataset[_Decoded]):
    def __init__(self, images: Sequence[Listed], preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> _Decoded:
        name, path = self.images[row]
        form = self.preprocessing.form
        try:
            if not path.is_file():
                return _Decoded(row, None, "does not exist")
            raw = load_image(path)
            found = bands(raw, form.channels, name)
            if not is_convertible(raw, form.channels, name):
                return _Decoded(row, None, f"has {found} channels and the network reads {form.channels}")
            if form.value_range and is_deep(raw) != form.deep:
                return _Decoded(row, None, f"has {bits(is_deep(raw))} and the network reads {bits(form.deep)}")
            largest = None if form.value_range else largest_value(raw)
            pixels = self.preprocessing.fitted(convert(raw, form, name))
        except (ACKDError, OSError, MemoryError) as error:
            reason = first_line(error, 1000).removeprefix(f"{name} ")
            return _Decoded(row, None, _IN_TRAINING.sub("", reason))
        dark = largest is not None and 0 < largest <= TWELVE_BITS
        return _Decoded(row, pixels, converted=0 if found == form.channels else found, dark=dark)


def read_batches(
    images: Sequence[Listed],
    preprocessing: Preprocessing,
    notes: Notes,
    *,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Decode images in order, a batch at a time; files that cannot be read are noted and left out.

    Args:
        images: Image files.
        preprocessing: How they are brought to the network's input.
        notes: Where conversions and unreadable files are noted.
        batch_size: Number of files of a batch.
        workers: Number of worker processes; None for up to 8, and none for few images.

    Yields:
        Positions of the readable images in ``images`` (``B`` int64), their pixels ``B x C x H x W`` before
        normalisation, and the number of files that were read, unreadable ones included. B may be 0.
    """
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(images) >= _WORTH_WORKERS else 0
    loader: DataLoader[_Decoded] = DataLoader(
        _ImageFiles(images, preprocessing),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=list,
        pin_memory=False,
    )
    for batch in loader:
        good = [each for each in batch if each.pixels is not None]
        notes.unreadable += [(images[each.row].name, each.problem) for each in batch if each.pixels is None]
        notes.converted.update(each.converted for each in good if each.converted)
        notes.dark += sum(each.dark for each in good)
        rows = torch.tensor([each.row for each in good], dtype=torch.int64)
        pixels = torch.stack([each.pixels for each in good]) if good else torch.empty(0)
        yield rows, pixels, len(batch)
