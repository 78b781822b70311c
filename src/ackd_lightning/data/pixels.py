"""Pixels of any depth and number of channels, brought to the range, the channels and the size of a network's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from ackd_lightning.errors import ACKDError

_DEPTH = 65535


TWELVE_BITS = 4095
"""Largest value of 12 bits."""


_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


Raw = Image.Image | NDArray[Any] | Tensor
"""A decoded file as it is: an image of 8 bits, an array of another depth, or ``C x H x W`` uint8."""


Decoded = Image.Image | Tensor
"""An image of 8 bits, or ``C x H x W`` uint8, or float32 from 0 to 1."""


class Spectral(np.ndarray[Any, Any]):
    """Decoded file without transparency: two or four channels are not grey or RGB with alpha."""


@dataclass(frozen=True)
class ImageFormat:
    """What image files become.

    Attributes:
        size: Height and width in pixels.
        channels: Number of channels. Files with another number are converted to 1 (grey) or 3 (RGB); any other number
            must be that of the files.
        value_range: Pixel values that become 0 and 1; values outside are clipped, and NaN
            becomes 0. None for the range of the file's
            own type: 255 for 8 bits, 65535 for 16 bits, 0 to 1 for floats.
        background: Colour that shows through transparent pixels, where alpha is not a channel.
        deep: Whether pixels are kept as float32 from 0 to 1, instead of uint8.
    """

    size: tuple[int, int]
    channels: int = 3
    value_range: tuple[float, float] | None = None
    background: str = "white"
    deep: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensors that images become."""
        return torch.float32 if self.deep else torch.uint8


def is_deep(raw: Raw) -> bool:
    """Whether a decoded file has more than 8 bits.

    Args:
        raw: Decoded file.
    """
    return not isinstance(raw, (Image.Image, Tensor)) and raw.dtype != np.uint8 and raw.dtype != np.bool_


def largest_value(raw: Image.Image | NDArray[Any]) -> int | None:
    """Largest value, without transparency, of an image of 16 bits without sign; None for any other.

    Args:
        raw: Result of `load_image`.
    """
    if isinstance(raw, Image.Image) or raw.dtype != np.uint16:
        return None
    alpha = not isinstance(raw, Spectral) and raw.ndim == 3 and raw.shape[2] in (2, 4)
    return int((raw[..., :-1] if alpha else raw).max(initial=0))


def bands(raw: Image.Image | NDArray[Any], channels: int, name: str) -> int:
    """Return the number of channels of a decoded file; a palette has those of its colours.

    Args:
        raw: Result of `load_image`.
        channels: Expected number of channels, by which arrays ``C x H x W`` are recognised.
        name: Name of the file.

    Raises:
        ACKDError: If it is an array of another number of dimensions.
    """
    if isinstance(raw, Image.Image):
        return (4 if "transparency" in raw.info else 3) if raw.mode == "P" else len(raw.getbands())
    return int(_channels_last(raw, channels, name).shape[2])


def is_convertible(raw: Image.Image | NDArray[Any], channels: int, name: str) -> bool:
    """Whether the channels of a decoded file can be converted to those that a network reads.

    Args:
        raw: Result of `load_image`.
        channels: Number of channels that the network reads.
        name: Name of the file.
    """
    found, colours = bands(raw, channels, name), (1, 3) if isinstance(raw, Spectral) else (1, 2, 3, 4)
    return found == channels or (channels in (1, 3) and found in colours)


def bits(deep: bool) -> str:
    """Return how many bits pixels have, in words.

    Args:
        deep: Whether they have more than 8.
    """
    return "more than 8 bits" if deep else "8 bits"


def top_of(largest: int) -> int:
    """Return the largest value that as many bits as pixels use, at least 8, can have.

    Args:
        largest: Largest value of the pixels.

    Examples:
        >>> top_of(3000), top_of(7)
        (4095, 255)
    """
    return int(2 ** max(8, largest.bit_length()) - 1)


def require_full_range(values: list[int], name: str) -> None:
    """Refuse 16-bit images none of which uses more than 12 bits, which would come out black.

    Args:
        values: Largest value of each image of 16 bits.
        name: Name of the first such image.

    Raises:
        ACKDError: Naming the largest value.
    """
    if values and 0 < max(values) <= TWELVE_BITS:
        raise ACKDError(
            f"images of 16 bits ({len(values):,}, such as {name}) have no value above {max(values):,} and would come "
            f"out black: set value_range to [0, {top_of(max(values))}], or to [0, {_DEPTH}] if they are that dark"
        )


def convert(raw: Raw, form: ImageFormat, name: str) -> Decoded:
    """Bring a decoded file to the channels and the range of a format.

    Args:
        raw: Decoded file.
        form: What it becomes.
        name: Name of the file.

    Raises:
        ACKDError: If it has another number of channels, or an unknown range of values.
    """
    if isinstance(raw, Tensor):  # has the channels already
        if form.value_range is None:
            return raw
        raw = raw.permute(1, 2, 0).numpy()
    elif isinstance(raw, Image.Image):
        image = _with_channels(raw, form, name)
        if form.value_range is None:
            return image
        raw = np.asarray(image)
    elif not is_convertible(raw, form.channels, name):
        raise _wrong_channels(name, bands(raw, form.channels, name), form.channels)
    return _array_channels(_scaled(_channels_last(raw, form.channels, name), form, name), form)


def _with_channels(image: Image.Image, form: ImageFormat, name: str) -> Image.Image:
    mode = _MODES.get(form.channels)
    if mode is None or (form.channels in (2, 4) and len(image.getbands()) != form.channels):
        if image.mode == "P" and form.channels == 4 and "transparency" in image.info:
            return image.convert("RGBA")
        raise _wrong_channels(name, len(image.getbands()), form.channels)
    if image.mode == "CMYK" and form.channels == 4:
        return image.convert("RGB").convert("RGBA")
    if form.channels in (2, 4) or (image.mode == mode and "transparency" not in image.info):
        return image  # convert would copy it
    if ("A" in image.mode.upper() and image.mode != "LAB") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, ImageColor.getrgb(form.background))
        image = Image.alpha_composite(canvas, layer)
        image = image.convert("RGB")
    if image.mode == "LAB":
        image = image.convert("RGB")  # the only mode that Pillow converts it to
    return image if image.mode == mode else image.convert(mode)


def _wrong_channels(name: str, found: int, channels: int) -> ACKDError:
    return ACKDError(f"{name} has {found} channels and channels is {channels}: set channels to {found}")


def _channels_last(array: NDArray[Any], channels: int, name: str) -> NDArray[Any]:
    """Return an array as ``H x W x C``; arrays ``C x H x W`` are recognised by the number of channels."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ACKDError(f"{name} is an array of shape {array.shape}: it must be H x W, H x W x C or C x H x W")
    if array.ndim == 2:
        return array[:, :, None]
    first, last = array.shape[0], array.shape[2]
    known = (channels, 1, 3, 4)
    if (last not in known and first in known) or last > 16 >= first:
        moved: NDArray[Any] = array.transpose(1, 2, 0)
        return moved
    return array


def _scaled(array: NDArray[Any], form: ImageFormat, name: str) -> NDArray[np.float32]:
    """Scale pixel values to 0 to 1."""
    values: NDArray[np.float32] = array.astype(np.float32)
    if form.value_range is not None:
        low, high = form.value_range
        scaled: NDArray[np.float32] = np.nan_to_num(((values - low) / (high - low)).clip(0, 1)).astype(np.float32)
        return scaled
    if array.dtype == np.bool_:
        return values
    if array.dtype in (np.uint8, np.uint16):
        values /= 255 if array.dtype == np.uint8 else _DEPTH
        return values
    if missing := int(np.isnan(values).sum()):
        raise ACKDError(
            f"{name} has {missing:,} pixels that are NaN: replace them, or set value_range to [lowest, highest], with "
            "which NaN becomes 0"
        )
    low, high = float(values.min()), float(values.max())
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return values
    raise ACKDError(
        f"{name} has {array.dtype} pixels from {low:g} to {high:g}, whose full range is unknown: set value_range to "
        "[lowest, highest]"
    )


def _array_channels(pixels: NDArray[np.float32], form: ImageFormat) -> Tensor:
    """Return ``C x H x W`` float32 with the channels of a format."""
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    found = image.shape[0]
    if found == form.channels:
        return image
    if found in (2, 4):
        colour = torch.tensor(ImageColor.getrgb(form.background)[:3]).view(3, 1, 1) / 255
        alpha = image[-1:]
        image = image[:-1].expand(3, -1, -1) * alpha + colour * (1 - alpha)
    return vision.rgb_to_grayscale(image) if form.channels == 1 and len(image) == 3 else image.expand(3, -1, -1)


def height_and_width(image: Decoded) -> tuple[int, int]:
    """Height and width of an image in pixels.

    Args:
        image: Decoded image.
    """
    height, width = vision.get_size(image)
    return height, width


def fit(image: Decoded, size: tuple[int, int], *, border: float = 1.0) -> Decoded:
    """Resize an image (bilinear) until it covers a size, and crop the centre; one of that size is returned as it is.

    Args:
        image: Decoded image of any size.
        size: Height and width of the result in pixels.
        border: Size before the crop, relative to that after it.
    """
    height, width = height_and_width(image)
    if (height, width) == size and border == 1:
        return image
    tall, wide = round(size[0] * border), round(size[1] * border)
    if tall * width >= wide * height:  # the rounding is that of torchvision
        wide = int(tall * width / height)
    else:
        tall = int(wide * height / width)
    resized = vision.resize(image, [tall, wide], antialias=True)
    return cast("Decoded", vision.center_crop(resized, list(size)))


def to_tensor(image: Decoded, form: ImageFormat) -> Tensor:
    """Return an image as ``C x H x W`` of the type of a format, channels innermost in memory.

    Args:
        image: Decoded image.
        form: Format.
    """
    if isinstance(image, Tensor) and image.dtype != torch.uint8:
        return image if form.deep else (image * 255).round().clamp(0, 255).to(torch.uint8)
    if isinstance(image, Tensor):
        return image / 255 if form.deep else image
    pixels = np.array(image)
    tensor = torch.from_numpy(pixels if pixels.ndim == 3 else pixels[:, :, None]).permute(2, 0, 1)
    return tensor / 255 if form.deep else tensor
