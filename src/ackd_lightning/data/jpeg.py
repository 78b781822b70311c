"""JPEG files, looked at without decoding them."""

from __future__ import annotations

import os

from PIL import Image

_HEAD = 4096
"""Bytes of a file in which its header is looked for."""
_TAIL = 16
_END = b"\xff\xd9"
_SCAN, _TABLE = 0xDA, 0xC4
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended and progressive frames, which PIL reads."""


def is_whole_jpeg(path: bytes) -> bool:
    """Whether a file is a JPEG of 8 bits, grey, RGB or CMYK, with an intact short header and its end marker.

    Millions of files are checked so, in a tenth of the time in which PIL reads their headers. False means that the file
    has to be opened to know.

    Args:
        path: The file.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        head = os.read(handle, _HEAD)
        os.lseek(handle, -min(_TAIL, len(head)), os.SEEK_END)
        tail = os.read(handle, _TAIL)
    except OSError:
        return False
    finally:
        os.close(handle)
    return _END in tail and _has_header(head)


def _has_header(head: bytes) -> bool:
    """Whether the segments before the first scan follow one another, with a frame of 8 bits and 1, 3 or 4 channels."""
    if head[:2] != b"\xff\xd8":
        return False
    place, frame, most = 2, False, len(head) - 10
    while place < most:
        if head[place] != 0xFF:
            return False
        kind, length = head[place + 1], head[place + 2] << 8 | head[place + 3]
        if kind == _SCAN:
            return frame
        if kind in _FRAMES:
            frame = head[place + 4] == 8 and head[place + 9] in (1, 3, 4)
            height, width = (head[place + at] << 8 | head[place + at + 1] for at in (5, 7))
            most_pixels = Image.MAX_IMAGE_PIXELS  # PIL refuses images of more than twice as many
            if not (frame and height and width) or (most_pixels and height * width > most_pixels):
                return False
        elif (kind != _TABLE and kind < _SCAN) or kind == 0xFF or length < 2:
            return False
        place += 2 + length
    return False
