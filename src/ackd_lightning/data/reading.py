"""Reading of many image files: decoding into one tensor, and the check for broken ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ackd_lightning.data.cache import fingerprint, read_cache, save_cache
from ackd_lightning.data.decoding import Encoded, ImageFile, has_deep_colours, label, load_image, stream
from ackd_lightning.data.jpeg import is_whole_jpeg
from ackd_lightning.data.messages import on_first_process, say
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.pixels import (
    TWELVE_BITS,
    ImageFormat,
    bits,
    convert,
    fit,
    is_deep,
    largest_value,
    require_full_range,
    to_tensor,
)
from ackd_lightning.data.sources import Files, Pixels, Records
from ackd_lightning.errors import ACKDError

_PLAIN = ("RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "YCbCr")
_WITH_PROGRESS = 2000
"""Number of images from which a progress bar is shown."""
_AT_ONCE = 256
"""Largest number of files that a thread works on at once."""
_LISTED = 6
"""Number of broken files that a message names."""

Found = TypeVar("Found")


class Depth(NamedTuple):
    """Depth of an image file.

    Attributes:
        deep: Whether it has more than 8 bits.
        largest: Largest value of an image of 16 bits without sign; None for any other.
    """

    deep: bool = False
    largest: int | None = None


_EIGHT_BITS = Depth()


def run_over(files: Files | Records, work: Callable[[int], Found], what: str) -> list[Found]:
    """Call ``work(position)`` for every file on a few threads, with a progress bar for many files on a terminal.

    Args:
        files: Files.
        work: Function of the position of a file.
        what: Text beside the progress bar.

    Returns:
        What ``work`` returned for each file.

    Raises:
        ACKDError: For the first file, in order, that ``work`` refuses, with the names of further ones.
    """

    def attempt(positions: range) -> list[Found | ACKDError]:
        answers: list[Found | ACKDError] = []
        for position in positions:
            try:
                answers.append(work(position))
            except ACKDError as error:
                answers.append(error)
        return answers

    show = len(files) >= _WITH_PROGRESS and sys.stderr.isatty() and on_first_process()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    threads = min(16, os.cpu_count() or 1)
    step = max(1, min(_AT_ONCE, len(files) // (4 * threads)))
    parts = [range(start, min(start + step, len(files))) for start in range(0, len(files), step)]
    found: list[Found] = []
    refused: list[tuple[int, ACKDError]] = []
    with Progress(*columns, disable=not show, transient=True) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task(what, total=len(files))
        try:
            for positions, answers in zip(parts, pool.map(attempt, parts), strict=True):
                for position, answer in zip(positions, answers, strict=True):
                    if isinstance(answer, ACKDError):
                        refused.append((position, answer))
                    else:
                        found.append(answer)
                if len(refused) > _LISTED:
                    break
                bar.advance(task, len(positions))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if len(refused) > 1:
        more = ", ".join(label(files.file(position)) for position, _ in refused[1:_LISTED])
        others = "" if len(refused) <= _LISTED else " and others"
        raise ACKDError(f"{refused[0][1]}; the same goes for {more}{others}") from refused[0][1]
    if refused:
        raise refused[0][1]
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

    def work(position: int) -> Depth:
        file = files.file(position)
        raw = load_image(file)
        images[position] = to_tensor(fit(convert(raw, form, label(file)), form.size), form)
        return Depth(is_deep(raw), largest_value(raw))

    note = _check_files_depth(files, run_over(files, work, f"reading {files.root.name}"), form)
    return Pixels(files.class_names, images, files.targets, note=note)


def _check_files_depth(files: Files | Records, depths: list[Depth], form: ImageFormat) -> str:
    """Check the depths of files; `check_depth` says how."""
    return check_depth(depths, form, str(files.root), lambda row: label(files.file(row)))


def check_depth(depths: list[Depth], form: ImageFormat, place: str, name: Callable[[int], str]) -> str:
    """Refuse 16-bit images none of which uses more than 12 bits, and a range of values for images of several depths.

    Args:
        depths: Depth of each image.
        form: What they become.
        place: Where they are, for messages.
        name: Function of the position of an image that names it.

    Returns:
        A sentence about images of another depth than the format's; empty if there are none.

    Raises:
        ACKDError: For such images, with the remedy.
    """
    values = {position: each.largest for position, each in enumerate(depths) if each.largest is not None}
    if values and form.value_range is None and len(values) == len(depths):
        require_full_range(list(values.values()), name(next(iter(values))))
    elif values and form.value_range is None and 0 < max(values.values()) <= TWELVE_BITS:
        names = [name(row) for row in list(values)[:_LISTED]]
        raise ACKDError(
            f"{len(values):,} of {len(depths):,} images in {place} have 16 bits, use at most 12 of them and would "
            f"come out black ({', '.join(names)}): convert them to 8 bits, or remove them"
        )
    others = [position for position, each in enumerate(depths) if each.deep != form.deep]
    if not others:
        return ""
    these = f"{len(others):,} of {len(depths):,} images in {place}, such as {name(others[0])}, have"
    if form.value_range is not None:
        raise ACKDError(
            f"{these} {bits(not form.deep)} and the first training image has {bits(form.deep)}, so value_range "
            f"{list(form.value_range)} cannot be right for both: store all images with the same depth"
        )
    if form.deep:
        return f"{these} 8 bits; they are read as they are, so that their 255 is as bright as 65535 of 16 bits"
    return f"{these} more than 8 bits and are reduced to 8 bits, which the first training image has"


def mark_of(files: Files | Records) -> str:
    """Return what images in a table depend on; empty for files, which have names, sizes and times.

    Args:
        files: Images.
    """
    return files.mark if isinstance(files, Records) else ""


def paths_of(files: Files | Records) -> PathTable:
    """Return the paths of image files; none for images in a table.

    Args:
        files: Images.
    """
    return files.paths if isinstance(files, Files) else PathTable(files.root)


def check_image_file(file: ImageFile, form: ImageFormat) -> Depth:
    """Check for a broken image by its header and end marker, without decoding it; decode it only when in doubt.

    Args:
        file: Image file.
        form: What it becomes.

    Returns:
        Its depth.

    Raises:
        ACKDError: If the file is empty, not an image, cut off, or does not fit the format.
    """
    if _ends_well(file, form):
        return Depth()
    raw = load_image(file)
    convert(raw, form, label(file))
    return Depth(is_deep(raw), largest_value(raw))


def _ends_well(file: ImageFile, form: ImageFormat) -> bool:
    """Whether a file is a JPEG or PNG of 8 bits with its end marker, in a mode that becomes grey or RGB."""
    if form.channels not in (1, 3) or form.value_range is not None:
        return False
    try:
        with Image.open(stream(file)) as image:
            kind, mode, deep = image.format, image.mode, has_deep_colours(image)
    except Exception:  # said when it is decoded
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


def check_files(files: Files | Records, form: ImageFormat, cache: Path | None) -> None:
    """Check every file for a broken image, unless ``cache`` states that the same files were checked before.

    Args:
        files: Image files.
        form: What they become.
        cache: Cache file, written when all files are good; None checks every time.

    Raises:
        ACKDError: For the first broken file.
    """
    paths = paths_of(files)
    stamp = fingerprint(paths, files.root, "checked", form.channels, form.value_range, form.deep, mark_of(files))
    content = None if cache is None else read_cache(cache, stamp)
    if content is None:
        plain = isinstance(files, Files) and form.channels in (1, 3) and form.value_range is None

        def check(row: int) -> Depth:
            if plain and is_whole_jpeg(paths.place(row)):
                return _EIGHT_BITS
            return check_image_file(files.file(row), form)

        found = run_over(files, check, f"checking {files.root.name}")
        content = {"fingerprint": stamp, "note": _check_files_depth(files, found, form)}
        if cache is not None:
            save_cache(cache, content)
    if content["note"]:
        say(content["note"])
