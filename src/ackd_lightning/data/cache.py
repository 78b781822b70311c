"""Cache of decoded pixels, and of which files were checked; a stale one is never used."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ackd_lightning.data.messages import say
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.sources import Pixels
from ackd_lightning.errors import first_line
from ackd_lightning.writing import whole_file

log = logging.getLogger(__name__)

_FORMAT = 5


def fingerprint(paths: PathTable, root: Path, *settings: object) -> str:
    """Hash the names, sizes and modification times of files.

    Args:
        paths: Files.
        root: Folder of the data, which may be moved.
        settings: Anything else that the cached content depends on.

    Raises:
        ACKDError: If a file cannot be read.
    """
    digest = hashlib.sha256(repr((_FORMAT, *settings)).encode())
    digest.update(os.fsencode(os.path.relpath(os.fsdecode(paths.root), root)))
    for part in (paths.text, paths.ends.data, paths.stamps().data):
        digest.update(part)
    return digest.hexdigest()


def read_cache(path: Path, mark: str) -> dict[str, Any] | None:
    """Load a cache file; None, and a log line, for a stale or damaged one.

    Args:
        path: Cache file, which need not exist.
        mark: Fingerprint that it must have.
    """
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = content["fingerprint"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        log.warning("the cache %s cannot be read: reading the images again", path)
        return None
    if found != mark:
        log.warning("the cache %s is stale (the images or the settings changed): reading the images again", path)
        return None
    return dict(content)


def save_cache(path: Path, content: dict[str, Any]) -> None:
    """Save a cache file, whole or not at all; warn when it cannot be written.

    Args:
        path: Cache file.
        content: Plain data and tensors, with the entry ``fingerprint``.
    """
    try:
        path.parent.stat()  # a folder that does not exist is not made
        with whole_file(path) as partial:
            torch.save(content, partial)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = first_line(error, 300)
        warnings.warn(
            f"could not write the cache {path} ({reason}), so the images are read at every start: make the folder "
            "writable or set cache: false",
            stacklevel=2,
        )


def cached(path: Path | None, mark: str, make: Callable[[], Pixels]) -> Pixels:
    """Return the pixels of a cache file, or make and save them when its fingerprint is another one.

    The file is memory-mapped: processes on one machine share it, and images that are not used are not read.

    Args:
        path: Cache file; None for no cache.
        mark: Fingerprint of the sources.
        make: Function that decodes the sources.
    """
    if path is not None and (content := read_cache(path, mark)) is not None:
        if content["note"]:
            say(content["note"])
        return Pixels(tuple(content["class_names"]), content["images"], content["targets"])
    pixels = make()
    if pixels.note:
        say(pixels.note)
    if path is not None:
        save_cache(
            path,
            {
                "fingerprint": mark,
                "class_names": list(pixels.class_names),
                "images": pixels.images,
                "targets": pixels.targets,
                "note": pixels.note,
            },
        )
    return pixels
