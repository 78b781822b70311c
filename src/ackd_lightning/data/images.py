"""Reading images from disk: class folders, decoding, the cache of decoded pixels."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from ackd_lightning.errors import ACKDError

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})

# What PIL raises on a file that is not a whole image; ValueError and SyntaxError come from broken PNG chunks.
_BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_CACHE_FORMAT = 1
_WITH_PROGRESS = 2000  # images from which on decoding shows a bar


# --------------------------------------------------------------------------------------------------- class folders


@dataclass(frozen=True)
class Files:
    """Labelled image files of one part of a data set.

    Attributes:
        root: folder of the part, for messages.
        class_names: name of each class; the position is the class index.
        paths: ``N`` image files.
        targets: ``N`` int64 class indices.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    targets: Tensor


@dataclass(frozen=True)
class Pixels:
    """Decoded images of one part of a data set.

    Attributes:
        class_names: name of each class; the position is the class index.
        images: ``N x 3 x S x S`` uint8.
        targets: ``N`` int64 class indices.
    """

    class_names: tuple[str, ...]
    images: Tensor
    targets: Tensor


def image_files(folder: Path) -> list[Path]:
    """List the images in ``folder`` and below, sorted by path; hidden files are passed over."""
    found: list[Path] = []
    for place, _, names in os.walk(folder, followlinks=True):
        here = Path(place)
        found += [here / n for n in names if not n.startswith(".") and os.path.splitext(n)[1].lower() in EXTENSIONS]  # noqa: PTH122
    return sorted(found)


def class_folders(path: Path) -> list[Path]:
    """List the folders directly below ``path``, sorted by name; hidden ones are passed over."""
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def scan_class_folders(path: Path, *, keep: Iterable[str] | None = None, remedy: str = "") -> Files:
    """List the images of a folder of class folders; the class index is the position in the sorted folder names.

    Args:
        path: folder that holds one folder for each class.
        keep: only the classes of these names, the others are left out.
        remedy: what to do when the layout is wrong, added to the messages.

    Returns:
        The files; in each class sorted by path.

    Raises:
        ACKDError: if the folder is missing, has no class folders, or a class folder holds no image.
    """
    hint = remedy or "make one folder for each class and put its images there"
    if not path.is_dir():
        raise ACKDError(f"there is no folder {path}: {hint}")
    folders = class_folders(path)
    if keep is not None:
        wanted = frozenset(keep)
        folders = [folder for folder in folders if folder.name in wanted]
    if not folders:
        loose = len(image_files(path))
        what = f"{loose:,} images but no class folders" if loose else "neither images nor class folders"
        raise ACKDError(f"{path} holds {what}: {hint}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        files = image_files(folder)
        if not files:
            raise ACKDError(f"the class folder {folder} holds no images: put some there or delete the folder")
        paths += files
        labels += [label] * len(files)
    return Files(path, tuple(folder.name for folder in folders), tuple(paths), torch.tensor(labels))


def require_same_classes(train: Sequence[str], test: Sequence[str], train_name: str, test_name: str) -> None:
    """Raise an `ACKDError` that names the first differing classes unless both parts have the same ones."""
    if tuple(train) == tuple(test):
        return
    only_train = sorted(set(train) - set(test))
    only_test = sorted(set(test) - set(train))
    parts = [
        f"only in {name}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for name, names in ((train_name, only_train), (test_name, only_test))
        if names
    ]
    raise ACKDError(
        f"training and test classes differ ({'; '.join(parts) or 'another order'}): both need the same class folders"
    )


# --------------------------------------------------------------------------------------------------------- decoding


def on_first_process() -> bool:
    """Whether this process is the one that talks to the user."""
    rank: Any = getattr(rank_zero_only, "rank", 0)  # set by Lightning
    return rank in (None, 0)


def read_image(path: Path) -> Image.Image:
    """Decode a file to RGB, whatever its mode (grey, palette, CMYK, 16 bit, with transparency).

    Raises:
        ACKDError: if the file is not a whole image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode.startswith("I"):  # 16 bit: keep the upper 8
                upper = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
                return Image.merge("RGB", [Image.fromarray(upper)] * 3)
            rgb: Image.Image = image
            if image.mode == "P" and "transparency" in image.info:
                rgb = image.convert("RGBA")
            return rgb if rgb.mode == "RGB" else rgb.convert("RGB")  # which would copy an RGB image
    except _BROKEN as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: BaseException) -> ACKDError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ACKDError(f"could not read the image {path} ({reason}): replace the file or delete it")


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Return ``image`` at ``size x size``: shorter side resized (bilinear), centre cut out; unchanged if it fits."""
    if image.size == (size, size):
        return image
    resized: Image.Image = vision.center_crop(vision.resize(image, [size], antialias=True), [size])
    return resized


def _array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image, dtype=np.uint8)


def run_over(paths: Sequence[Path], work: Callable[[int], None], what: str) -> None:
    """Call ``work(position)`` for every file on a few threads, with a progress bar for many files on a terminal."""
    show = len(paths) >= _WITH_PROGRESS and sys.stderr.isatty() and on_first_process()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    threads = min(16, os.cpu_count() or 1)
    with Progress(*columns, disable=not show, transient=True) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task(what, total=len(paths))
        try:
            for _ in pool.map(work, range(len(paths))):
                bar.advance(task)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def decode(files: Files, size: int) -> Pixels:
    """Read all the files into one tensor at ``size x size`` (uint8).

    Raises:
        ACKDError: on the first file, in order, that is not a whole image.
    """
    images = torch.empty(len(files.paths), 3, size, size, dtype=torch.uint8)
    store = images.numpy()

    def work(position: int) -> None:
        store[position] = _array(fit_square(read_image(files.paths[position]), size)).transpose(2, 0, 1)

    run_over(files.paths, work, f"reading {files.root.name}")
    return Pixels(files.class_names, images, files.targets)


# ------------------------------------------------------------------------------------------------------------ cache


def fingerprint(paths: Sequence[Path], root: Path, *settings: object) -> str:
    """Hash names, sizes and modification times of files, and what else the decoded pixels depend on."""
    digest = hashlib.sha256(repr((_CACHE_FORMAT, *settings)).encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise _broken(path, error) from None
        digest.update(f"{os.path.relpath(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write_atomically(path: Path, content: dict[str, Any]) -> None:
    """Save through a temporary file in the same folder, so that a killed process leaves no half file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_cache(path: Path, mark: str) -> dict[str, Any] | None:
    """Load a cache file whose fingerprint is ``mark``; None (and a log line) for a stale or damaged one."""
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        found = content["fingerprint"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError):
        log.warning("the cache %s cannot be read: decoding the images again", path)
        return None
    if found != mark:
        log.warning("the cache %s is stale (the images or the settings changed): decoding the images again", path)
        return None
    return dict(content)


def _save_cache(path: Path, content: dict[str, Any]) -> None:
    try:
        _write_atomically(path, content)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"could not write the cache {path} ({reason}): going on without it, so the images are decoded at every "
            "start; make the folder writable or set cache: false",
            stacklevel=2,
        )


def cached(path: Path | None, mark: str, make: Callable[[], Pixels]) -> Pixels:
    """Return the pixels of the cache file at ``path`` if its fingerprint is ``mark``, else make and save them.

    A stale cache is never used. The file is memory-mapped: processes on one machine share it, and images that are not
    looked at are not read.

    Args:
        path: the cache file, or None for no cache.
        mark: fingerprint of the sources.
        make: decodes the sources.
    """
    if path is not None and (content := _read_cache(path, mark)) is not None:
        return Pixels(tuple(content["class_names"]), content["images"], content["targets"])
    pixels = make()
    if path is not None:
        _save_cache(
            path,
            {
                "fingerprint": mark,
                "class_names": list(pixels.class_names),
                "images": pixels.images,
                "targets": pixels.targets,
            },
        )
    return pixels


def check_image_file(path: Path) -> None:
    """Look for a broken image without decoding it: header and end marker; only in doubt all of it is decoded.

    Raises:
        ACKDError: if the file is empty, not an image, or cut off.
    """
    try:
        with Image.open(path) as image:
            kind = image.format
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16))
            tail = file.read()
    except _BROKEN as error:
        raise _broken(path, error) from None
    if (kind == "JPEG" and b"\xff\xd9" in tail) or (kind == "PNG" and b"IEND" in tail):
        return
    read_image(path)


def check_files(files: Files, cache: Path | None) -> None:
    """Check every file once; which files were good is remembered in ``cache`` by their fingerprint.

    Raises:
        ACKDError: on the first broken file.
    """
    mark = fingerprint(files.paths, files.root, "checked")
    if cache is not None and _read_cache(cache, mark) is not None:
        return
    run_over(files.paths, lambda position: check_image_file(files.paths[position]), f"checking {files.root.name}")
    if cache is not None:
        _save_cache(cache, {"fingerprint": mark})
