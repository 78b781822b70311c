"""`StoredDataModule`: data sets that lie in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.cache import cached, fingerprint
from ackd_lightning.data.decoding import check_files, decode
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Files, Pixels, class_folders
from ackd_lightning.validation import checked

ROOT = "data"


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
        if place is not None and (folders := class_folders(place)):
            self.class_names = tuple(folder.name for folder in folders)
            self.num_classes = len(folders)

    def _class_place(self) -> Path | None:
        """Return the folder with the class folders of the training part; None for another layout."""
        return None

    def _cache_file(self, folder: Path, part: str) -> Path | None:
        return folder / f"ackd-cache-{part}-{self.input_size}px.pt" if self.cache else None

    def _decoded(self, files: Files, folder: Path, part: Part) -> Pixels:
        """Decode small images, or read them from the cache in ``folder``."""
        mark = fingerprint(files.paths, files.root, self.input_size, files.class_names)
        return cached(self._cache_file(folder, part), mark, lambda: decode(files, self.input_size))

    def _checked(self, files: Files, folder: Path, part: Part) -> Files:
        """Check for broken files, unless a file in ``folder`` states that they were checked before."""
        check_files(files, folder / f"ackd-checked-{part}.pt" if self.cache else None)
        return files
