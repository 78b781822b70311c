"""`StoredDataModule`: data sets that lie in a folder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.cache import cached, fingerprint
from ackd_lightning.data.folders import class_names_of, say_order
from ackd_lightning.data.reading import check_files, decode, mark_of, paths_of
from ackd_lightning.data.sources import Files, Pixels, Records
from ackd_lightning.types import height_width
from ackd_lightning.validation import checked

ROOT = "data"
Found = TypeVar("Found", bound="Files | Records")


class StoredDataModule(ImageDataModule):
    """Images in a folder, with a cache of what was decoded or checked.

    Args:
        root: Folder of the data.
        cache: Whether to keep decoded images, or the list of checked files, as a file in the folder of the data.
        options: Arguments of [`ImageDataModule`][ackd_lightning.data.ImageDataModule].
    """

    @checked
    def __init__(self, root: str | Path = ROOT, *, cache: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.cache = cache
        place = self._class_place()
        if place is not None and (names := class_names_of(place)):
            self.class_names = names
            self.num_classes = len(names)
            say_order(names, "text")

    def _class_place(self) -> Path | None:
        """Return the folder with the class folders of the training part; None for another layout."""
        return None

    def _folder_classes(self) -> tuple[str, ...] | None:
        """Return the names of the class folders of the training part in their own order, for the other parts."""
        place = self._class_place()
        return None if place is None else class_names_of(place)

    def _cache_file(self, folder: Path, part: str) -> Path | None:
        height, width = height_width(self.input_size)
        size = f"{height}px" if height == width else f"{height}x{width}px"
        return folder / f"ackd-cache-{part}-{size}.pt" if self.cache else None

    def _decoded(self, files: Files | Records, folder: Path, part: str) -> Pixels:
        """Decode small images, or read them from the cache in ``folder``."""
        form = self.image_format
        targets = hashlib.sha256(files.targets.numpy().tobytes()).hexdigest()
        mark = fingerprint(paths_of(files), files.root, form, files.class_names, targets, mark_of(files))
        return replace(cached(self._cache_file(folder, part), mark, lambda: decode(files, form)), names=files.names)

    def _checked(self, files: Found, folder: Path, part: str) -> Found:
        """Check for broken files, unless a file in ``folder`` states that they were checked before."""
        check_files(files, self.image_format, folder / f"ackd-checked-{part}.pt" if self.cache else None)
        return files
