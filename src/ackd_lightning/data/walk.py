"""Walk through a folder: which files are images, which are passed over, and what is said about them."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from PIL import Image

from ackd_lightning.data.decoding import HEIF
from ackd_lightning.data.messages import say
from ackd_lightning.data.path_table import Listed
from ackd_lightning.errors import ACKDError, count_of

_ALWAYS = (
    ".jpg .jpeg .jpe .jfif .jp2 .j2k .png .apng .bmp .dib .gif .ppm .pgm .pbm .pnm .tif .tiff .tga .webp .avif .npy"
)
_SYSTEM_FOLDERS = frozenset(
    {
        "@eadir",
        "@recycle",
        "__macosx",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "#recycle",
        "#snapshot",
        "__pycache__",
    }
)
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"})
_OURS = re.compile(r"ackd-(cache|checked)-.*\.pt")


def extensions() -> frozenset[str]:
    """Return the endings of files that are read as images, those of phones only where pillow-heif is installed."""
    return frozenset(_ALWAYS.split()) | (HEIF if find_spec("pillow_heif") is not None else frozenset())


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; an entry that cannot be read is none.

    Args:
        entry: Entry of a folder.
    """
    try:
        return entry.is_dir()
    except OSError:
        return False


def passed_over(name: str) -> bool:
    """Whether a folder of this name is hidden or belongs to a system.

    Args:
        name: Name of the folder.
    """
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def identity(folder: Path) -> tuple[int, int]:
    """Return what tells a folder from all others, whatever it is called.

    Args:
        folder: Folder.
    """
    status = folder.stat()
    return status.st_dev, status.st_ino


def above(folder: Path) -> set[tuple[int, int]]:
    """Return the identities of the folders above one, by its path and by where links in it lead.

    Args:
        folder: Folder.
    """
    found = set[tuple[int, int]]()
    for each in {*Path(os.path.abspath(folder)).parents, *folder.resolve().parents}:  # noqa: PTH100
        with suppress(OSError):
            found.add(identity(each))
    return found


class Walk:
    """Images below some folders, and what is passed over there.

    Args:
        apart: Folders that are not entered, as they are read for something else.

    Attributes:
        folders: Number of hidden and system folders, by name.
        hidden: Number of hidden images.
        loose: Number of images that lie beside the class folders.
        links: Number of links to a folder that was read already, or that is above.
        special: Number of pipes, sockets and device files, which are never opened.
        others: Number of other files by their ending.
    """

    def __init__(self, apart: Sequence[Path] = ()) -> None:
        self._apart = {identity(each) for each in apart}
        self._read: dict[tuple[int, int], tuple[Path, Path]] = {}
        self.folders: Counter[str] = Counter()
        self.hidden = self.loose = self.links = self.special = 0
        self.others: Counter[str] = Counter()
        self._endings = extensions()

    def images(self, folder: Path) -> list[Path]:
        """List the images in a folder and below, sorted by path.

        Args:
            folder: Folder.

        Raises:
            ACKDError: If a folder cannot be read.
        """
        return [folder / name for name, _, _ in self.listed(folder)]

    def listed(self, folder: Path) -> list[Listed]:
        """List the images in a folder and below with their sizes and times, sorted by path.

        Every file is looked at once.

        Args:
            folder: Folder.

        Raises:
            ACKDError: If a folder cannot be read, or is also in another folder that was listed before.
        """
        found: list[Listed] = []
        seen = above(folder)
        waiting, deep = [""], False
        while waiting:
            prefix = waiting.pop()
            here = folder / prefix
            try:
                this = identity(here)
                if prefix and this in self._apart:
                    continue
                if prefix and this in seen:
                    self.links += 1
                    continue
                seen.add(this)
                self._check_label(this, folder, here)
                with os.scandir(here) as entries:
                    folders = self._images_of(prefix, entries, found)
            except OSError as error:
                unreadable(error)
            deep = deep or bool(folders)
            waiting += [os.path.join(prefix, each) for each in sorted(folders, reverse=True)]  # noqa: PTH118
        found.sort(key=(lambda each: Path(each[0]).parts) if deep else None)
        return found

    def _check_label(self, this: tuple[int, int], folder: Path, here: Path) -> None:
        """Refuse a folder that a link shows in two classes, so that its images would have two labels."""
        other, place = self._read.setdefault(this, (folder, here))
        if other != folder and place.resolve() == here.resolve():
            raise ACKDError(
                f"{place} and {here} are one folder, so that its images would belong to two classes: remove the link"
            )

    def _images_of(self, prefix: str, entries: Iterable[os.DirEntry[str]], found: list[Listed]) -> list[str]:
        """Add the images of one folder to those that were found, and return the folders in it."""
        endings, folders = self._endings, []
        for entry in entries:
            name = entry.name
            if is_folder(entry):
                if passed_over(name):
                    self.folders.update([name])
                else:
                    folders.append(name)
            elif (name[name.rfind(".") :].lower() in endings and name[0] != ".") or self._is_image(entry):
                size = time = -1  # a link to nothing is reported as a file that cannot be read
                try:
                    status = entry.stat()
                    if stat.S_IFMT(status.st_mode) != stat.S_IFREG:  # reading it may never end
                        self.special += 1
                        continue
                    size, time = status.st_size, status.st_mtime_ns
                except OSError:
                    pass
                found.append((os.path.join(prefix, name) if prefix else name, size, time))  # noqa: PTH118
        return folders

    def beside(self, path: Path) -> None:
        """Count what lies beside the class folders and is not read.

        Args:
            path: Folder of class folders.
        """
        with os.scandir(path) as entries:
            for entry in entries:
                if is_folder(entry):
                    self.folders.update([entry.name] if passed_over(entry.name) else [])
                elif os.path.splitext(entry.name)[1].lower() in self._endings and entry.name[0] != ".":  # noqa: PTH122
                    self.loose += 1

    def _is_image(self, entry: os.DirEntry[str]) -> bool:
        """Whether a file whose name does not show that it is an image is one, or cannot be told before it is opened."""
        name = entry.name
        ending = os.path.splitext(name)[1].lower()  # noqa: PTH122
        if name.startswith("."):
            # "._cat.png" beside "cat.png" is what macOS stores about it
            self.hidden += not name.startswith("._") and ending in self._endings
            return False
        if name.lower() in _SYSTEM_FILES or _OURS.fullmatch(name):
            return False
        if not ending and (_is_special(Path(entry.path)) or _looks_like_image(Path(entry.path))):
            return True
        if _is_special(Path(entry.path)):
            self.special += 1
        else:
            self.others[ending or "no ending"] += 1
        return False

    def report(self, place: Path) -> None:
        """Log a line about what was passed over, if anything was.

        Args:
            place: Folder that was read.
        """
        parts = []
        if self.others:
            endings = ", ".join(f"{ending} ({count:,})" for ending, count in self.others.most_common(5))
            count = sum(self.others.values())
            parts.append(
                f"{count:,} {'files that are not images' if count > 1 else 'file that is not an image'}: {endings}"
            )
        if self.folders:
            parts.append(f"hidden and system folders: {', '.join(sorted(self.folders)[:5])}")
        if self.hidden:
            parts.append(count_of(self.hidden, "hidden image"))
        if self.loose:
            parts.append(f"{count_of(self.loose, 'image')} beside the class folders")
        if self.special:
            parts.append(f"{self.special:,} {'pipes or devices' if self.special > 1 else 'pipe or device'}")
        if self.links:
            parts.append(f"{count_of(self.links, 'link')} to folders that were read already, or that are above")
        if parts:
            heif = HEIF & set(self.others) and "; photos of phones need pip install 'ackd-lightning[heic]'"
            say(f"passed over in {place}: {'; '.join(parts)}{heif or ''}")


def unreadable(error: OSError) -> NoReturn:
    """Refuse a folder that cannot be read.

    Args:
        error: What the system says.

    Raises:
        ACKDError: Always, with the remedy.
    """
    raise ACKDError(
        f"the folder {error.filename} cannot be read ({error.strerror}): give yourself access, or move it out of the "
        "data"
    ) from error


def _is_special(path: Path) -> bool:
    """Whether a path is neither a file nor a folder: reading it may never end."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False  # a link to nothing is reported as a file that cannot be read


def _looks_like_image(path: Path) -> bool:
    """Whether PIL knows the format of a file without an ending."""
    try:
        with Image.open(path):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # a damaged file can fail in any way
        return False


def image_files(folder: Path) -> list[Path]:
    """List the images in ``folder`` and below, sorted by path, without hidden files and folders."""
    return Walk().images(folder)
