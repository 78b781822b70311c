"""Reading of image files: decoding, resizing, and the check for broken ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torchvision.transforms.v2 import functional as vision

from ackd_lightning.data.cache import broken_image, fingerprint, read_cache, save_cache
from ackd_lightning.data.sources import Files, Pixels

# What PIL raises on a file that is not a whole image; ValueError and SyntaxError come from broken PNG chunks.
_BROKEN = (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

_WITH_PROGRESS = 2000
"""Number of images from which a progress bar is shown."""


def on_first_process() -> bool:
    """Whether this process is the one that prints."""
    rank: Any = getattr(rank_zero_only, "rank", 0)  # set by Lightning
    return rank in (None, 0)


def read_image(path: Path) -> Image.Image:
    """Decode a file to RGB, whatever its mode (grey, palette, CMYK, 16 bit, with transparency).

    Raises:
        ACKDError: If the file is not a whole image.
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
            return rgb if rgb.mode == "RGB" else rgb.convert("RGB")  # convert would copy an RGB image
    except _BROKEN as error:
        raise broken_image(path, error) from None


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` (bilinear) and crop the centre; an image of that size is returned as it is.

    Args:
        image: Image of any size.
        size: Height and width of the result in pixels.
    """
    if image.size == (size, size):
        return image
    resized: Image.Image = vision.center_crop(vision.resize(image, [size], antialias=True), [size])
    return resized


def _array(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image, dtype=np.uint8)


def run_over(paths: Sequence[Path], work: Callable[[int], None], what: str) -> None:
    """Call ``work(position)`` for every file on a few threads, with a progress bar for many files on a terminal.

    Args:
        paths: Files.
        work: Function of the position of a file in ``paths``.
        what: Text beside the progress bar.
    """
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
    """Read all the files into one uint8 tensor.

    Args:
        files: ``N`` labelled image files.
        size: Height and width of the decoded images in pixels.

    Raises:
        ACKDError: For the first file, in order, that is not a whole image.
    """
    images = torch.empty(len(files.paths), 3, size, size, dtype=torch.uint8)
    store = images.numpy()

    def work(position: int) -> None:
        store[position] = _array(fit_square(read_image(files.paths[position]), size)).transpose(2, 0, 1)

    run_over(files.paths, work, f"reading {files.root.name}")
    return Pixels(files.class_names, images, files.targets)


def check_image_file(path: Path) -> None:
    """Check for a broken image by its header and end marker, without decoding it; decode it only when in doubt.

    Raises:
        ACKDError: If the file is empty, not an image, or cut off.
    """
    try:
        with Image.open(path) as image:
            kind = image.format
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16))
            tail = file.read()
    except _BROKEN as error:
        raise broken_image(path, error) from None
    if (kind == "JPEG" and b"\xff\xd9" in tail) or (kind == "PNG" and b"IEND" in tail):
        return
    read_image(path)


def check_files(files: Files, cache: Path | None) -> None:
    """Check every file for a broken image, unless ``cache`` states that the same files were checked before.

    Args:
        files: Labelled image files.
        cache: Cache file, written when all files are good; None checks every time.

    Raises:
        ACKDError: For the first broken file.
    """
    mark = fingerprint(files.paths, files.root, "checked")
    if cache is not None and read_cache(cache, mark) is not None:
        return
    run_over(files.paths, lambda position: check_image_file(files.paths[position]), f"checking {files.root.name}")
    if cache is not None:
        save_cache(cache, {"fingerprint": mark})
