"""Folders of class folders as people have them: what is read, what is passed over, and which part a folder holds."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NoReturn

import torch
from PIL import Image, UnidentifiedImageError

from ackd_lightning.data.decoding import HEIF
from ackd_lightning.data.messages import say
from ackd_lightning.data.path_table import Listed, PathTable
from ackd_lightning.data.sources import Files
from ackd_lightning.errors import ACKDError, count_of

ClassOrder = Literal["text", "natural"]

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
_REST = r"([ _.-]?(set|data|images|imgs|split|dir|folder|\d+))?"
_PARTS = {
    "train": re.compile(rf"(train(ing)?|trn){_REST}"),
    "val": re.compile(rf"(val(id(ation)?)?|dev(el)?){_REST}"),
    "test": re.compile(rf"(test(ing)?|tst|eval(uation)?|holdout){_REST}"),
}
_SHOWN = 3


def extensions() -> frozenset[str]:
    """Return the endings of files that are read as images, those of phones only where pillow-heif is installed."""
    return frozenset(_ALWAYS.split()) | (HEIF if find_spec("pillow_heif") is not None else frozenset())


def part_of(name: str) -> str | None:
    """Return the part of the data that a folder is named after: ``train``, ``val``, ``test`` or None.

    Args:
        name: Name of a folder.

    Examples:
        >>> [part_of(name) for name in ("Training", "test_images", "VAL", "trainset", "terrier")]
        ['train', 'test', 'val', 'train', None]
    """
    return next((part for part, pattern in _PARTS.items() if pattern.fullmatch(name.lower())), None)


def _passed_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


class Walk:
    """Images below some folders, and what is passed over there.

    Attributes:
        folders: Number of hidden and system folders, by name.
        hidden: Number of hidden images.
        loose: Number of images that lie beside the class folders.
        links: Number of links to a folder that was read already.
        special: Number of pipes, sockets and device files, which are never opened.
        others: Number of other files by their ending.
    """

    def __init__(self) -> None:
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
            ACKDError: If a folder cannot be read.
        """
        found: list[Listed] = []
        seen: set[tuple[int, int]] = set()
        waiting, deep = [""], False
        while waiting:
            prefix = waiting.pop()
            here = folder / prefix
            try:
                status = here.stat()
                if (status.st_dev, status.st_ino) in seen:
                    self.links += 1
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(here) as entries:
                    folders = self._images_of(prefix, entries, found)
            except OSError as error:
                _unreadable(error)
            deep = deep or bool(folders)
            waiting += [os.path.join(prefix, each) for each in sorted(folders, reverse=True)]  # noqa: PTH118
        found.sort(key=(lambda each: Path(each[0]).parts) if deep else None)
        return found

    def _images_of(self, prefix: str, entries: Iterable[os.DirEntry[str]], found: list[Listed]) -> list[str]:
        """Add the images of one folder to those that were found, and return the folders in it."""
        endings, folders = self._endings, []
        for entry in entries:
            name = entry.name
            try:
                inside = entry.is_dir()
            except OSError:
                inside = False
            if inside:
                if _passed_over(name):
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
                if entry.is_dir():
                    self.folders.update([entry.name] if _passed_over(entry.name) else [])
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
            parts.append(f"{self.hidden:,} hidden {'images' if self.hidden > 1 else 'image'}")
        if self.loose:
            parts.append(f"{self.loose:,} {'images' if self.loose > 1 else 'image'} beside the class folders")
        if self.special:
            parts.append(f"{self.special:,} {'pipes or devices' if self.special > 1 else 'pipe or device'}")
        if self.links:
            parts.append(f"{count_of(self.links, 'link')} to folders that were read already")
        if parts:
            heif = HEIF & set(self.others) and "; photos of phones need pip install 'ackd-lightning[heic]'"
            say(f"passed over in {place}: {'; '.join(parts)}{heif or ''}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _unreadable(error: OSError) -> NoReturn:
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
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return False


def image_files(folder: Path) -> list[Path]:
    """List the images in ``folder`` and below, sorted by path, without hidden files and folders."""
    return Walk().images(folder)


def sort_key(order: ClassOrder, name: str) -> tuple[object, ...]:
    """Return a key that sorts names as text, or with numbers in them by their value.

    Args:
        order: Order of the names.
        name: Name of a class.
    """
    if order == "text":
        return (name,)
    return tuple((1, "", int(part)) if part.isdecimal() else (0, part, 0) for part in re.split(r"(\d+)", name) if part)


def class_folders(path: Path, order: ClassOrder = "text") -> list[Path]:
    """List the folders directly below ``path``, sorted by name, without hidden ones and those of file systems.

    Args:
        path: Folder, which need not exist.
        order: Whether names are sorted as text, or with numbers in them by their value.
    """
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:  # whose entries mostly know what they are
        folders = [path / entry.name for entry in entries if _is_folder(entry) and not _passed_over(entry.name)]
    return sorted(folders, key=lambda folder: sort_key(order, class_name(folder)))


def class_name(folder: Path) -> str:
    """Return the name of a class folder in composed Unicode (NFC), whatever the file system stores.

    Args:
        folder: Class folder.

    Raises:
        ACKDError: If the name is not UTF-8.
    """
    try:
        folder.name.encode("utf-8")
    except UnicodeEncodeError:
        raise ACKDError(f"the class folder {os.fsencode(folder)!r} has a name that is not UTF-8: rename it") from None
    return unicodedata.normalize("NFC", folder.name)


def class_names_of(path: Path, order: ClassOrder = "text") -> tuple[str, ...]:
    """Return the names of the class folders directly below ``path`` in the order of their indices.

    Args:
        path: Folder, which need not exist.
        order: Whether names are sorted as text, or with numbers in them by their value.

    Raises:
        ACKDError: If two names differ only in how Unicode composes them.
    """
    names = tuple(class_name(folder) for folder in class_folders(path, order))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ACKDError(
            f"{path} has two class folders named {twice[0]!r}, composed differently in Unicode: put their images into "
            "one folder"
        )
    return names


def require_classes(path: Path, names: Sequence[str]) -> None:
    """Refuse a folder of class folders that is plainly something else: one class, or parts of the data as classes.

    Args:
        path: Folder.
        names: Names of its class folders.

    Raises:
        ACKDError: Naming what the folder holds, and the likely root.
    """
    parts = [part_of(name) for name in names]
    words = [next(filter(None, map(part_of, re.split(r"[\W_]+", name))), None) for name in names]
    several = None not in words and "train" in words and len(set(words)) > 1  # pets_train and pets_test
    if names and (None not in parts or several):
        raise ACKDError(
            f"{path} holds the folders {', '.join(names[:_SHOWN])}, which are parts of the data and not classes: name "
            "them with train_dir and test_dir"
        )
    for name in names:
        below = [each.name for each in class_folders(path / name) if part_of(each.name)]
        if below:
            raise ACKDError(f"{path / name} holds {below[0]}, so {name} is not a class: set root to {path / name}")
    if len(names) == 1:
        deeper = path / names[0]
        while len(inner := class_folders(deeper)) == 1:
            deeper = inner[0]
        remedy = f"set root to {deeper}" if inner else "add a folder for each further class"
        raise ACKDError(f"{path} holds a single class folder, {names[0]}, and a classifier needs two classes: {remedy}")


def say_order(names: Sequence[str], order: ClassOrder) -> None:
    """Log a line when the classes are numbers that are sorted as text.

    Args:
        names: Names of the classes in the order of their indices.
        order: Order in which they were sorted.
    """
    if order == "text" and all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names):
        say(
            f"classes are numbers that are sorted as text ({', '.join(names[:_SHOWN])}, …); class_order: natural sorts "
            "them by value"
        )


def scan_class_folders(
    path: Path,
    *,
    classes: Sequence[str] | None = None,
    others: Literal["refuse", "skip"] = "refuse",
    order: ClassOrder = "text",
    remedy: str = "",
) -> Files:
    """List the images of a folder of class folders; the class index is the position in the sorted folder names.

    Args:
        path: Folder that holds one folder for each class.
        classes: Names of the classes of the training part in the order of their indices, for another part. Classes
            that have no images here are allowed, with a line.
        others: How to handle class folders that are not in ``classes``.
        order: Whether names are sorted as text, or with numbers in them by their value.
        remedy: Remedy for a wrong layout, added to the messages.

    Returns:
        The files, sorted by class and then by path.

    Raises:
        ACKDError: If the folder is missing, has no class folders, a class of the training part has no image, or
            another part has classes that the training part lacks.
    """
    hint = remedy or "make one folder for each class and put its images there"
    if not path.is_dir():
        raise ACKDError(f"there is no folder {path}: {hint}")
    folders = {class_name(folder): folder for folder in class_folders(path, order)}
    found = class_names_of(path, order)
    if not folders:
        loose = len(image_files(path))
        what = f"{loose:,} images but no class folders" if loose else "neither images nor class folders"
        raise ACKDError(f"{path} holds {what}: {hint}")
    names = found if classes is None else tuple(classes)
    walk, tables = Walk(), list[PathTable]()
    for name in names:
        listed = walk.listed(folders[name]) if name in folders else []
        tables.append(PathTable.of(path, listed, folders[name].name if name in folders else ""))
    counts = torch.tensor([len(each) for each in tables])
    empty = [name for name, table in zip(names, tables, strict=True) if not len(table)]
    _check_empty(path, folders, empty, whole=classes is None)
    walk.beside(path)
    if classes is not None and others == "refuse":
        refuse_other_classes(path, names)
    walk.report(path)
    return Files(path, names, PathTable.joined(tables), torch.arange(len(names)).repeat_interleave(counts))


def refuse_other_classes(path: Path, classes: Sequence[str]) -> None:
    """Refuse class folders with images that the training part lacks.

    Args:
        path: Folder of class folders.
        classes: Names of the classes of the training part.

    Raises:
        ACKDError: Naming up to three of them.
    """
    unknown = [folder for folder in class_folders(path) if class_name(folder) not in set(classes)]
    if unknown and (named := [class_name(folder) for folder in unknown if Walk().images(folder)]):
        raise ACKDError(
            f"{path} has classes that the training part lacks ({_listed(named)}): add training images of them, or move "
            "these folders out of the data"
        )


def _check_empty(path: Path, folders: Iterable[str], empty: Sequence[str], *, whole: bool) -> None:
    if not empty:
        return
    if whole:
        raise ACKDError(
            f"the class folder {path / empty[0]} holds no images: add some, or delete this class in all parts"
        )
    if not set(folders) - set(empty):
        raise ACKDError(f"{path} has no images of the classes of the training part ({_listed(empty)}): add some")
    say(f"{path} has no images of {len(empty):,} of the training part's classes: {_listed(empty)}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
