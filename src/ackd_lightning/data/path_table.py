"""`PathTable`: millions of image files in a few arrays."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ackd_lightning.data.decoding import broken_image

_AT_ONCE = 1 << 16
"""Number of files whose names are separate objects at one time."""

Listed = tuple[str, int, int]
"""A file as a folder lists it: path relative to the folder; size in bytes, -1 for a file that cannot be read; time of
the last change of its content in ns."""


class PathTable:
    """Paths of image files, and their sizes and times when they were listed.

    A `Path` takes half a kilobyte, and a worker that changes its reference count copies its memory. Here a path is the
    bytes of its name in one text.

    Args:
        root: Folder that the names are relative to.
        names: Names of ``N`` files. One that is absolute stays so.
        stamps: ``N x 2`` int64: size in bytes and time of the last change in ns; None to look when they are needed.
    """

    def __init__(self, root: Path | str, names: Sequence[str] = (), stamps: NDArray[np.int64] | None = None) -> None:
        joined = "".join(names)
        self.root, self.text = os.fsencode(root), os.fsencode(joined)
        bytes_of = names if joined.isascii() else map(os.fsencode, names)
        lengths = np.fromiter(map(len, bytes_of), np.int64, len(names))
        self.ends: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        self._stamps = stamps

    @classmethod
    def of_paths(cls, root: Path, paths: Iterable[Path]) -> PathTable:
        """Make a table of a few paths.

        Args:
            root: Folder that the names are relative to.
            paths: The files.
        """
        return cls(
            root, [str(path.relative_to(root) if path.is_relative_to(root) else path.absolute()) for path in paths]
        )

    @classmethod
    def of(cls, root: Path | str, listed: Sequence[Listed], prefix: str = "") -> PathTable:
        """Make a table of files that were listed.

        Args:
            root: Folder that the names are relative to.
            listed: The files.
            prefix: Folder below ``root`` that they were listed in.
        """
        stamps = np.array([each[1:] for each in listed], np.int64).reshape(-1, 2)
        start = f"{prefix}{os.sep}" if prefix else ""
        return cls(root, [f"{start}{each[0]}" for each in listed], stamps)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[Path]:
        return (self[position] for position in range(len(self)))

    def name(self, position: int) -> bytes:
        """Return the name of a file.

        Args:
            position: Position of the file, from 0.
        """
        return self.text[self.ends[position] : self.ends[position + 1]]

    def place(self, position: int) -> bytes:
        """Return the path of a file as the file system knows it.

        Args:
            position: Position of the file, from 0.
        """
        return os.path.join(self.root, self.name(position))  # noqa: PTH118

    def __getitem__(self, position: int) -> Path:
        return Path(os.fsdecode(self.place(range(len(self))[position])))

    def relative_to(self, folder: Path) -> tuple[str, ...]:
        """Return the paths relative to a folder.

        Args:
            folder: Folder.
        """
        here = os.fsencode(folder)
        if here != self.root:
            return tuple(os.path.relpath(path, folder) for path in self)
        ends = self.ends.tolist()
        names = (self.text[start:end] for start, end in pairwise(ends))
        return tuple(os.fsdecode(os.path.relpath(name, here) if os.path.isabs(name) else name) for name in names)  # noqa: PTH117

    def stamps(self) -> NDArray[np.int64]:
        """Return sizes and times, ``N x 2``.

        Raises:
            ACKDError: If a file cannot be read.
        """
        if self._stamps is None:
            found = [status_of(self.place(position)) for position in range(len(self))]
            self._stamps = np.array(found, np.int64).reshape(-1, 2)
        for position in (self._stamps[:, 0] < 0).nonzero()[0][:1].tolist():
            try:
                self[position].stat()
            except OSError as error:
                raise broken_image(self[position], error) from None
        return self._stamps

    def bare(self) -> PathTable:
        """Return the same table without sizes and times, for worker processes."""
        return self._with(self.text, self.ends, None)

    def select(self, rows: Tensor) -> PathTable:
        """Return some of the files.

        Args:
            rows: ``M`` int64 positions.
        """
        chosen = rows.numpy()
        texts = []
        for part in np.split(chosen, range(_AT_ONCE, len(chosen), _AT_ONCE)):
            pairs = zip(self.ends[part].tolist(), self.ends[part + 1].tolist(), strict=True)
            texts.append(b"".join([self.text[start:end] for start, end in pairs]))
        lengths = self.ends[chosen + 1] - self.ends[chosen]
        stamps = None if self._stamps is None else self._stamps[chosen]
        return self._with(b"".join(texts), np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]), stamps)

    def _with(self, text: bytes, ends: NDArray[np.int64], stamps: NDArray[np.int64] | None) -> PathTable:
        other = PathTable(os.fsdecode(self.root))
        other.text, other.ends, other._stamps = text, ends, stamps
        return other

    @staticmethod
    def joined(tables: Sequence[PathTable]) -> PathTable:
        """Return one table of the files of several, which have one root.

        Args:
            tables: The tables, at least one.
        """
        shifts = np.cumsum([0, *(len(each.text) for each in tables)])
        ends = [each.ends[1:] + shift for each, shift in zip(tables, shifts[:-1], strict=True)]
        stamps = [each._stamps for each in tables if each._stamps is not None]
        return tables[0]._with(
            b"".join([each.text for each in tables]),
            np.concatenate([np.zeros(1, np.int64), *ends]),
            np.concatenate(stamps) if len(stamps) == len(tables) else None,
        )

    def below(self, root: Path) -> PathTable:
        """Return the same files with names relative to another folder, or absolute where they are not in it.

        Args:
            root: Folder.
        """
        own = Path(os.fsdecode(self.root))
        start = str(own.relative_to(root)) if own.is_relative_to(root) else str(own.absolute())
        names = [os.path.join(start, os.fsdecode(self.name(position))) for position in range(len(self))]  # noqa: PTH118
        return PathTable(root, names, self._stamps)


def status_of(path: bytes | str) -> tuple[int, int]:
    """Return size and time of the last change of a file; -1 for one that cannot be read.

    Args:
        path: The file.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns
