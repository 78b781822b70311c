"""Reading of many image files: decoding into one tensor, and the check for broken ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ackd_lightning.data.cache import fingerprint, read_cache, save_cache
from ackd_lightning.data.decoding import BROKEN, Encoded, ImageFile, has_deep_colours, label, load_image, stream
from ackd_lightning.data.messages import on_first_process
from ackd_lightning.data.pixels import ImageFormat, convert, fit, largest_value, require_full_range, to_tensor
from ackd_lightning.data.sources import Files, Pixels, Records

_PLAIN = ("RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "YCbCr")
_WITH_PROGRESS = 2000
"""Number of images from which a progress bar is shown."""


def run_over(paths: Sequence[object], work: Callable[[int], int | None], what: str) -> list[int | None]:
    """Call ``work(position)`` for every file on a few threads, with a progress bar for many files on a terminal.

    Args:
        paths: Files.
        work: Function of the position of a file in ``paths``.
        what: Text beside the progress bar.

    Returns:
        What ``work`` returned for each file.
    """
    show = len(paths) >= _WITH_PROGRESS and sys.stderr.isatty() and on_first_process()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    threads = min(16, os.cpu_count() or 1)
    found: list[int | None] = []
    with Progress(*columns, disable=not show, transient=True) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task(what, total=len(paths))
        try:
            for value in pool.map(work, range(len(paths))):
                found.append(value)
                bar.advance(task)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return found


def decode(files: Files | Records, form: ImageFormat) -> Pixels:
    """Read all the files into one tensor.

    Args:
        files: ``N`` image files.
        form: What they become.

    Raises:
        ACKDError: For the first file, in order, that is not a whole image or does not fit the format.
    """
    images = torch.empty(len(files), form.channels, *form.size, dtype=form.dtype)

    def work(position: int) -> int | None:
        file = files.file(position)
        raw = load_image(file)
        images[position] = to_tensor(fit(convert(raw, form, label(file)), form.size), form)
        return largest_value(raw)

    _check_depth(files, run_over(range(len(files)), work, f"reading {files.root.name}"), form)
    return Pixels(files.class_names, images, files.targets)


def _check_depth(files: Files | Records, largest: list[int | None], form: ImageFormat) -> None:
    """Refuse 16-bit images none of which uses more than 12 bits."""
    if form.value_range is not None:
        return
    deep = {position: value for position, value in enumerate(largest) if value is not None}
    if deep:
        require_full_range(list(deep.values()), label(files.file(next(iter(deep)))))


def paths_of(files: Files | Records) -> tuple[Path, ...]:
    """Return the paths of image files; none for images in a table.

    Args:
        files: Images.
    """
    return files.paths if isinstance(files, Files) else ()


def check_image_file(file: ImageFile, form: ImageFormat) -> int | None:
    """Check for a broken image by its header and end marker, without decoding it; decode it only when in doubt.

    Args:
        file: Image file.
        form: What it becomes.

    Returns:
        Largest value of an image of 16 bits; None for any other.

    Raises:
        ACKDError: If the file is empty, not an image, cut off, or does not fit the format.
    """
    if _ends_well(file, form):
        return None
    raw = load_image(file)
    convert(raw, form, label(file))
    return largest_value(raw)


def _ends_well(file: ImageFile, form: ImageFormat) -> bool:
    """Whether a file is a JPEG or PNG of 8 bits with its end marker, in a mode that becomes grey or RGB."""
    if form.channels not in (1, 3) or form.value_range is not None:
        return False
    try:
        with Image.open(stream(file)) as image:
            kind, mode, deep = image.format, image.mode, has_deep_colours(image)
    except BROKEN:
        return False
    if deep or mode not in _PLAIN:
        return False
    tail = _tail(file)
    return (kind == "JPEG" and b"\xff\xd9" in tail) or (kind == "PNG" and b"IEND" in tail)


def _tail(file: ImageFile) -> bytes:
    if isinstance(file, Encoded):
        return file.content[-16:]
    with file.open("rb") as handle:
        handle.seek(0, os.SEEK_END)
        handle.seek(max(0, handle.tell() - 16))
        return handle.read()


def check_files(files: Files | Records, form: ImageFormat, mark: str, cache: Path | None) -> None:
    """Check every file for a broken image, unless ``cache`` states that the same files were checked before.

    Args:
        files: Image files.
        form: What they become.
        mark: What images that are not files depend on.
        cache: Cache file, written when all files are good; None checks every time.

    Raises:
        ACKDError: For the first broken file.
    """
    stamp = fingerprint(paths_of(files), files.root, "checked", form.channels, form.value_range, mark)
    if cache is not None and read_cache(cache, stamp) is not None:
        return
    found = run_over(
        range(len(files)), lambda row: check_image_file(files.file(row), form), f"checking {files.root.name}"
    )
    _check_depth(files, found, form)
    if cache is not None:
        save_cache(cache, {"fingerprint": stamp})
