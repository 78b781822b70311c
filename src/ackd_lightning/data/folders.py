"""Folders of class folders as people have them: what is read, what is passed over, and which part a folder holds."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch

from ackd_lightning.data.messages import say
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.sources import Files
from ackd_lightning.data.walk import Walk, above, identity, image_files, is_folder, passed_over
from ackd_lightning.errors import ACKDError, first_names

ClassOrder = Literal["text", "natural"]

_REST = r"([ _.-]?(set|data|images|imgs|split|dir|folder|\d+))?"
_PARTS = {
    "train": re.compile(rf"(train(ing)?|trn){_REST}"),
    "val": re.compile(rf"(val(id(ation)?)?|dev(el)?){_REST}"),
    "test": re.compile(rf"(test(ing)?|tst|eval(uation)?|holdout){_REST}"),
}
_SHOWN = 3


def part_of(name: str) -> str | None:
    """Return the part of the data that a folder is named after: ``train``, ``val``, ``test`` or None.

    Args:
        name: Name of a folder.

    Examples:
        >>> [part_of(name) for name in ("Training", "test_images", "VAL", "trainset", "terrier")]
        ['train', 'test', 'val', 'train', None]
    """
    return next((part for part, pattern in _PARTS.items() if pattern.fullmatch(name.lower())), None)


def sort_key(order: ClassOrder, name: str) -> tuple[object, ...]:
    """Return a key that sorts names as text, or with numbers in them by their value.

    Args:
        order: Order of the names.
        name: Name of a class.
    """
    if order == "text":
        return (name,)
    parts = (part for part in re.split(r"(\d+)", name) if part)
    return tuple((1, "", int(part)) if part.isdecimal() else (0, part, 0) for part in parts), name  # 1 before 01


def class_folders(path: Path, order: ClassOrder = "text", apart: Sequence[Path] = ()) -> list[Path]:
    """List the folders directly below ``path``, sorted by name, without hidden ones and those of file systems.

    A link to ``path``, to a folder above it or to one in it, or a second link to one folder, is left out.

    Args:
        path: Folder, which need not exist.
        order: Whether names are sorted as text, or with numbers in them by their value.
        apart: Folders that are no class.
    """
    folders, again = _folders_in(path)
    left_out = {identity(each) for each in apart}
    kept = [each for each in folders if each not in again and not (left_out and identity(each) in left_out)]
    return sorted(kept, key=lambda each: sort_key(order, class_name(each)))


def _folders_in(path: Path) -> tuple[list[Path], set[Path]]:
    """Return the folders in a folder, and those of them that are links to another one of them, to it, or above it."""
    if not path.is_dir():
        return [], set()
    with os.scandir(path) as entries:  # whose entries mostly know what they are
        kept = [entry for entry in entries if is_folder(entry) and not passed_over(entry.name)]
    links = sorted(path / entry.name for entry in kept if entry.is_symlink())
    folders = [path / entry.name for entry in kept]
    again = set[Path]()
    if links:
        seen = {identity(path)} | above(path) | {identity(each) for each in folders if each not in links}
        for link in links:
            if identity(link) in seen:
                again.add(link)
            seen.add(identity(link))
    return folders, again


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


def class_names_of(path: Path, order: ClassOrder = "text", apart: Sequence[Path] = ()) -> tuple[str, ...]:
    """Return the names of the class folders directly below ``path`` in the order of their indices.

    Args:
        path: Folder, which need not exist.
        order: Whether names are sorted as text, or with numbers in them by their value.
        apart: Folders that are no class.

    Raises:
        ACKDError: If two names differ only in how Unicode composes them.
    """
    names = tuple(class_name(folder) for folder in class_folders(path, order, apart))
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
    apart: Sequence[Path] = (),
    remedy: str = "",
) -> Files:
    """List the images of a folder of class folders; the class index is the position in the sorted folder names.

    Args:
        path: Folder that holds one folder for each class.
        classes: Names of the classes of the training part in the order of their indices, for another part. Classes
            that have no images here are allowed, with a line.
        others: How to handle class folders that are not in ``classes``.
        order: Whether names are sorted as text, or with numbers in them by their value.
        apart: Folders in ``path``, at any depth, that are not read.
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
    folders = {class_name(folder): folder for folder in class_folders(path, order, apart)}
    found = class_names_of(path, order, apart)
    if not folders:
        loose = len(image_files(path))
        what = f"{loose:,} images but no class folders" if loose else "neither images nor class folders"
        raise ACKDError(f"{path} holds {what}: {hint}")
    names = found if classes is None else tuple(classes)
    walk, tables = Walk(apart), list[PathTable]()
    walk.links += len(_folders_in(path)[1])
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
            f"{path} has classes that the training part lacks ({first_names(named)}): add training images of them, or "
            "move these folders out of the data"
        )


def _check_empty(path: Path, folders: Iterable[str], empty: Sequence[str], *, whole: bool) -> None:
    if not empty:
        return
    if whole:
        raise ACKDError(
            f"the class folder {path / empty[0]} holds no images: add some, or move it out of the data, in all parts"
        )
    if not set(folders) - set(empty):
        raise ACKDError(f"{path} has no images of the classes of the training part ({first_names(empty)}): add some")
    say(f"{path} has no images of {len(empty):,} of the training part's classes: {first_names(empty)}")
