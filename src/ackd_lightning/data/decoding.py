"""Reading of one image file, of any format and depth, as it is."""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ackd_lightning.data.pixels import Decoded, ImageFormat, Raw, Spectral, convert
from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.extras import require

_LOWER = ("RGB;16B", "RGBA;16B")
_ORIENTATION = 0x0112
_PHOTOMETRIC, _WHITE_IS_ZERO = 0x0106, 0
_ON_ITS_SIDE = (5, 6, 7, 8)
_JPEG = ("JPEG", "MPO")
_JPEG_ENDINGS = (".jpg", ".jpeg")
_PLAIN = {1: "L", 3: "RGB"}
_BITS_PER_SAMPLE, _COMPRESSION, _SAMPLES_PER_PIXEL = 258, 259, 277
_JPEG_2000 = b"\xff\x4f\xff\x51"  # before its sizes, of which byte 38 holds the depth
Factor = Callable[[int, int], int]
HEIF = frozenset({".heic", ".heif", ".hif"})
"""Endings of photos of phones, which PIL reads with the package pillow-heif."""

_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_HUGE = "it has more pixels than Pillow reads safely"


class Encoded(NamedTuple):
    """An image file that is held in memory.

    Attributes:
        name: Name for messages.
        content: Bytes of the file.
    """

    name: str
    content: bytes


ImageFile = Path | Encoded


def label(file: ImageFile) -> str:
    """Return the name of an image file for messages.

    Args:
        file: Image file.
    """
    return str(file) if isinstance(file, Path) else file.name


def broken_image(file: ImageFile, error: BaseException) -> ACKDError:
    """Return the error for a file that is not a whole image.

    Args:
        file: Image file.
        error: Exception that reading it raised.
    """
    if isinstance(error, Image.DecompressionBombError):
        return ACKDError(f"could not read the image {label(file)} ({_HUGE}): make it smaller")
    if isinstance(error, PermissionError):
        return ACKDError(f"could not read the image {label(file)} ({error.strerror}): change its permissions")
    reason = first_line(error, 300)
    if isinstance(error, UnidentifiedImageError):
        reason = "its content is no image that Pillow knows"
    return ACKDError(f"could not read the image {label(file)} ({reason}): replace the file or delete it")


def _bytes(file: ImageFile) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file.content


def stream(file: ImageFile) -> Path | io.BytesIO:
    """Return what PIL opens.

    Args:
        file: Image file.
    """
    return file if isinstance(file, Path) else io.BytesIO(file.content)


def suffix_of(file: ImageFile) -> str:
    """Return the ending of an image file in small letters.

    Args:
        file: Image file.
    """
    return os.path.splitext(label(file))[1].lower()  # noqa: PTH122


@functools.cache
def register_heif() -> bool:
    """Let PIL read HEIC photos where pillow-heif is installed; return whether it is."""
    if find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _is_heif(file: ImageFile) -> bool:
    """Whether a file is a photo of a phone, whatever its ending: some programs rename them to .jpg."""
    head = file.content[:12] if isinstance(file, Encoded) else b""
    if isinstance(file, Path):
        with suppress(OSError), file.open("rb") as handle:
            head = handle.read(12)
    return head[4:8] == b"ftyp" and head[8:] in _HEIF_BRANDS


def _orientation(image: Image.Image) -> int:
    """Return the orientation that a camera has stored, 1 for none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF data that cannot be read, in any way, name no orientation
        return 1


def _oriented(image: Image.Image) -> Image.Image:
    """Apply the orientation that a camera has stored."""
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above
        return image


def has_deep_colours(image: Image.Image) -> bool:
    """Whether an open image has more than 8 bits for each colour, which PIL would cut to 8.

    Args:
        image: Image that is not loaded yet.
    """
    if image.mode not in ("RGB", "RGBA"):
        return False
    tiles: Any = getattr(image, "tile", ())
    if image.format == "PNG":
        return bool(tiles) and str(tiles[0][3]).endswith("16B")
    if image.format == "PPM":
        return bool(tiles) and isinstance(tiles[0][3], tuple) and tiles[0][3][1] > 255
    tags: Any = getattr(image, "tag_v2", {})
    return image.format == "TIFF" and any(bits > 8 for bits in tags.get(_BITS_PER_SAMPLE, ()))


def _has_more(image: Image.Image) -> bool:
    """Whether a TIFF has channels, or grey pages where the packages for them are installed, that PIL leaves out."""
    tags: Any = getattr(image, "tag_v2", {})
    plain = tags.get(_COMPRESSION, 1) == 1
    readable = find_spec("tifffile") is not None and (plain or find_spec("imagecodecs") is not None)
    pages = readable and len(image.getbands()) == 1 and getattr(image, "n_frames", 1) > 1
    return pages or tags.get(_SAMPLES_PER_PIXEL, 1) > len(image.getbands())


def _array(data: bytes) -> NDArray[Any]:
    # CPython before 3.12.1 counts the depth of syntax trees for all threads together, so that reading a header
    # beside another thread can end in a meaningless SystemError (python/cpython#106905).
    for _ in range(3):
        with suppress(SystemError):
            return _pixels(np.load(io.BytesIO(data), allow_pickle=False))
    return _pixels(np.load(io.BytesIO(data), allow_pickle=False))


def _pixels(found: Any) -> NDArray[Any]:
    """Refuse what is no array of numbers, such as an archive of several arrays."""
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "buif":
        raise ValueError(f"it holds {getattr(found, 'dtype', 'several arrays')} and not one array of real numbers")
    return found


def load_image(file: ImageFile) -> Image.Image | NDArray[Any]:
    """Decode a file as it is.

    Args:
        file: Image file.

    Returns:
        An image of 8 bits; an array ``H x W`` or ``H x W x C`` for other depths and for arrays.

    Raises:
        ACKDError: If the file is not a whole image, or needs a package that is not installed.
    """
    raw, _ = _load(file, None)
    return cast("Image.Image | NDArray[Any]", raw)  # tensors only for a crop


def load_for_crop(file: ImageFile, channels: int, factor: Factor) -> tuple[Raw, tuple[int, int] | None]:
    """Decode a file of which a crop is needed, which is faster than `load_image` for a JPEG.

    A large JPEG is decoded at a half, a quarter or an eighth of its size. Where simplejpeg is installed, it decodes
    those that are grey or RGB as they are needed; the pixels are those of PIL.

    Args:
        file: Image file.
        channels: Number of channels that is needed.
        factor: Function of height and width, as the image is seen, that returns 1, 2, 4 or 8: by how much it may be
            reduced.

    Returns:
        The image as of `load_image`, or ``C x H x W`` uint8; and height and width of the whole one if it was reduced,
        otherwise None.

    Raises:
        ACKDError: As of `load_image`.
    """
    if isinstance(file, Path) and suffix_of(file) in _JPEG_ENDINGS:
        with suppress(OSError):  # said below
            file = Encoded(str(file), file.read_bytes())
    return _load(file, lambda image: _jpeg_for_crop(file, image, channels, factor))


def _jpeg_for_crop(
    file: ImageFile, image: Image.Image, channels: int, factor: Factor
) -> tuple[Raw, tuple[int, int] | None]:
    (width, height), turn = image.size, _orientation(image)
    seen = (width, height) if turn in _ON_ITS_SIDE else (height, width)
    by = factor(*seen)
    whole = seen if by > 1 else None
    plain = turn == 1 and image.mode == _PLAIN.get(channels)
    if plain and isinstance(file, Encoded) and (library := _simplejpeg()) is not None:
        size = {"min_height": -(-height // by), "min_width": -(-width // by)} if by > 1 else {}
        with suppress(ValueError):  # PIL decodes it, or says what is wrong
            pixels = library.decode_jpeg(
                file.content, "RGB" if channels == 3 else "GRAY", fastdct=False, fastupsample=False, **size
            )
            return torch.from_numpy(pixels).permute(2, 0, 1), whole
    if by > 1:
        image.draft(image.mode, (width // by, height // by))
    return as_decoded(image), whole


@functools.cache
def _simplejpeg() -> Any:
    return import_module("simplejpeg") if find_spec("simplejpeg") else None


def _load(
    file: ImageFile, jpeg: Callable[[Image.Image], tuple[Raw, tuple[int, int] | None]] | None, *, renamed: bool = True
) -> tuple[Raw, tuple[int, int] | None]:
    """Decode a file; ``jpeg`` decodes an open JPEG, and ``renamed`` says whether it may be a HEIC photo after all."""
    suffix = suffix_of(file)
    if suffix in HEIF:
        register_heif()
    try:
        return _opened(file, suffix, jpeg)
    except UnidentifiedImageError as error:
        if suffix in (".tif", ".tiff"):
            return _tiff(file).view(Spectral), None
        photo = suffix in HEIF or _is_heif(file)
        if photo and not register_heif():
            require("pillow_heif", "heic", label(file))
        if photo and renamed:
            return _load(file, jpeg, renamed=False)  # now PIL knows the format
        raise broken_image(file, error) from None
    except (ACKDError, MemoryError, SystemError):
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise broken_image(file, error) from None


def _opened(
    file: ImageFile, suffix: str, jpeg: Callable[[Image.Image], tuple[Raw, tuple[int, int] | None]] | None
) -> tuple[Raw, tuple[int, int] | None]:
    if suffix == ".npy":
        return _array(_bytes(file)).view(Spectral), None
    with Image.open(stream(file)) as image:
        deep = has_deep_colours(image)
        if deep and image.format == "PNG":
            return _deep_png(file), None
        if deep and image.format == "PPM":
            return _deep_ppm(file, image), None
        if deep or (image.format == "TIFF" and _has_more(image)):
            return _tiff(file) if image.mode in ("LA", "RGBA") else _tiff(file).view(Spectral), None
        if image.format == "JPEG2000" and len(image.getbands()) > 1:
            _check_jpeg_2000(file)
        return jpeg(image) if jpeg and image.format in _JPEG else (as_decoded(image), None)


def as_decoded(image: Image.Image) -> Image.Image | NDArray[Any]:
    """Turn an image as its camera states, and return one of more than 8 bits as an array.

    Args:
        image: Image of PIL.

    Returns:
        An image of 8 bits; an array ``H x W`` for other depths.
    """
    handle: Any = image
    inverted = False
    if image.format == "TIFF":
        if _orientation(image) in _ON_ITS_SIDE:
            handle.filename = ""  # otherwise Pillow maps a plain file into memory by the size of the turned image
        inverted = handle.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    image.load()
    image = _oriented(image)
    if image.mode.startswith(("I", "F")):
        array = np.asarray(image)
        array = array.astype(np.uint16) if array.dtype.kind == "u" or image.mode == "I;16B" else array
        return _inverted(array) if inverted else array  # Pillow inverts those of 8 bits alone
    return image


def _inverted(array: NDArray[Any]) -> NDArray[Any]:
    """Invert whole numbers of which 0 is white; others have no largest value."""
    return np.iinfo(array.dtype).max - array if array.dtype.kind == "u" else array


def _deep_ppm(file: ImageFile, image: Image.Image) -> NDArray[Any]:
    """Decode a PPM with more than 8 bits for each colour, whose header names the largest value."""
    handle: Any = image
    kind, _, offset, (_, top) = handle.tile[0]
    content, shape = _bytes(file)[offset:], (image.height, image.width, len(image.getbands()))
    if kind == "ppm_plain":
        values = np.array(re.sub(rb"#[^\r\n]*", b"", content).split()).astype(np.int64)
    else:
        values = np.frombuffer(content, ">u2", int(np.prod(shape)))
    array: NDArray[Any] = (values.clip(0, top) * (65535 / top)).round().astype(np.uint16)
    return array.reshape(shape)


def _check_jpeg_2000(file: ImageFile) -> None:
    """Refuse more than 8 bits for each colour: Pillow 13 makes the brightest values black."""
    _, _, sizes = _bytes(file).partition(_JPEG_2000)
    if sizes[38:39] and sizes[38] & 0x7F > 7:
        wrong = "is a JPEG 2000 with more than 8 bits for each colour, which Pillow reads wrongly"
        raise ACKDError(f"{label(file)} {wrong}: convert it to PNG or TIFF")


def _deep_png(file: ImageFile) -> NDArray[Any]:
    """Decode a PNG with 16 bits for each colour: PIL returns the upper 8, or the lower 8 in another byte order."""
    halves = []
    for order in "BL":
        with Image.open(stream(file)) as image:
            handle: Any = image
            kind, box, offset, mode = handle.tile[0]
            if mode == "LA;16B":  # which PIL has in no other byte order: its four bytes are read as four colours
                handle.tile = [type(handle.tile[0])(kind, box, offset, "RGBA")]
                return _turned(np.array(image).view(">u2").astype(np.uint16), _orientation(image))
            if mode in _LOWER:
                handle.tile = [type(handle.tile[0])(kind, box, offset, f"{mode[:-1]}{order}")]
            halves.append(np.array(image, dtype=np.uint16))
            turn = _orientation(image)  # which loads the image
    array: NDArray[Any] = halves[0] << 8 | halves[1]
    return _turned(array, turn)


def _turned(array: NDArray[Any], turn: int) -> NDArray[Any]:
    """Turn pixels ``H x W x C`` by an orientation of EXIF, as `PIL.ImageOps.exif_transpose` does."""
    if turn in _ON_ITS_SIDE:
        array = array.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        array = array[::-1]
    if turn in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def _tiff(file: ImageFile) -> NDArray[Any]:
    """Decode a TIFF with channels, depths or pages that PIL does not read."""
    tifffile = require("tifffile", "tiff", f"{label(file)} is not read whole by Pillow and")
    try:
        with tifffile.TiffFile(io.BytesIO(_bytes(file))) as opened:
            array: NDArray[Any] = opened.asarray()
            page, axes = opened.pages.first, opened.series[0].axes
            tags = [page.tags.valueof(each, default=1) for each in (_PHOTOMETRIC, _ORIENTATION)]
        array = _inverted(array) if tags[0] == _WHITE_IS_ZERO else array
        seen = axes.index("Y"), axes.index("X")
        return np.moveaxis(_turned(np.moveaxis(array, seen, (0, 1)), tags[1]), (0, 1), seen)
    except Exception as error:  # a damaged file can fail in any way
        if "imagecodecs" in str(error):
            raise ACKDError(f"{label(file)} is compressed: pip install imagecodecs to read it") from None
        raise broken_image(file, error) from None


def read_image(file: ImageFile, form: ImageFormat) -> Decoded:
    """Decode a file of any mode and depth to the channels of a format, at its own size.

    Args:
        file: Image file.
        form: What it becomes.

    Raises:
        ACKDError: If the file is not a whole image, has another number of channels, or an unknown range of values.
    """
    return convert(load_image(file), form, label(file))
