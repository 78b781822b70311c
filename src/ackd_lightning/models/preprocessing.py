"""Images as a network was trained on them: normalisation, size and channels, converted from the student's view."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.models.copies import examples, hooks_remedy, image_channels
from ackd_lightning.models.finding import probe
from ackd_lightning.types import DataInfo, ImageSize, check_scale, height_width

Interpolation = Literal["nearest", "bilinear", "bicubic"]

_LUMINANCE = (0.299, 0.587, 0.114)
_SIDES = (32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 299, 320, 384, 448, 512)
"""Sizes that are tried on a network that cannot read the data's."""

_BATCHES = (1, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 50, 64, 100, 128, 256)
"""Numbers of images that are tried on a network that does not run on two."""


@dataclass(frozen=True)
class Preprocessing:
    """Images that a network expects.

    Args:
        mean: Mean of each channel, of pixels in 0 to 1; None when unknown.
        std: Standard deviation of each channel, as ``mean``.
        input_size: Side of the images in pixels, or their height and width; None for any.
        interpolation: How images of another size are resized; None for ``bilinear``.
        origin: Where these values come from, in messages; None for values that a user gave.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: ImageSize | None = None
    interpolation: Interpolation | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ACKDError: If mean or std is missing beside the other, their lengths differ, a standard deviation is not
                above 0, one of them is above what pixels in 0 to 1 can have, or a size is not 1 or more.
        """
        if len(self.mean or ()) != len(self.std or ()):
            raise ACKDError(f"mean is {self.mean} and std is {self.std}; give both, with one number per channel")
        if self.std is not None and not all(0 < each < math.inf for each in self.std):
            raise ACKDError(f"std is {self.std}; it must have numbers above 0")
        if self.input_size is not None and min(height_width(self.input_size)) < 1:
            raise ACKDError(f"input_size is {self.input_size}; it must be 1 or more pixels")
        check_scale(self.mean, self.std)

    def filled(self, other: Preprocessing) -> Preprocessing:
        """Take what is missing from another one.

        Args:
            other: Preprocessing that is asked where this one has no value.
        """
        statistics = self if self.mean is not None else other
        return Preprocessing(
            statistics.mean,
            statistics.std,
            self.input_size or other.input_size,
            self.interpolation or other.interpolation,
            statistics.origin,
        )

    def plain(self) -> dict[str, Any]:
        """Return mean, std, size and interpolation as plain data."""
        return {
            "mean": self.mean and list(map(float, self.mean)),
            "std": self.std and list(map(float, self.std)),
            "input_size": self.input_size and list(height_width(self.input_size)),
            "interpolation": self.interpolation,
        }


def closest_interpolation(name: str) -> Interpolation:
    """Return the kind of interpolation that torch has for a name of another library.

    Args:
        name: Name such as ``lanczos``.

    Examples:
        >>> closest_interpolation("lanczos"), closest_interpolation("box")
        ('bicubic', 'bilinear')
    """
    if name.startswith("nearest"):
        return "nearest"
    return "bicubic" if name in ("bicubic", "lanczos") else "bilinear"


def stated_by(network: nn.Module) -> Preprocessing:
    """Return what a network says about its images: timm's ``pretrained_cfg``.

    The size of the published weights counts for a network that has their number of classes; one with other classes was
    trained on other images.

    Args:
        network: Any network.
    """
    config = getattr(network, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("mean") or not config.get("std"):
        return Preprocessing()
    published = config.get("num_classes") == getattr(network, "num_classes", None)
    size = tuple(config.get("input_size") or ())[-2:] if published else ()
    return Preprocessing(
        tuple(config["mean"]),
        tuple(config["std"]),
        (size[0], size[1]) if len(size) == 2 else None,
        closest_interpolation(str(config.get("interpolation", "bilinear"))),
        "its pretrained_cfg",
    )


def channels_of(network: nn.Module, own: Preprocessing, otherwise: int) -> int:
    """Return the number of channels of the images that a network reads.

    Args:
        network: Any network.
        own: Preprocessing of the network.
        otherwise: Number for a network without convolutions or statistics.
    """
    return image_channels(network, len(own.mean) if own.mean is not None else otherwise)


def usable_size(
    network: nn.Module, data: DataInfo, *, given: ImageSize | None, stated: ImageSize | None, channels: int, name: str
) -> ImageSize:
    """Choose the size of the images that a network gets.

    Args:
        network: Network, which may be on the meta device.
        data: Size of the data's images.
        given: Size that a user asks for; it is used or refused.
        stated: Size that the network was trained with; None for the data's.
        channels: Channels that the network reads.
        name: Name of the network in messages.

    Returns:
        ``given``, else ``stated``, else the data's size; where the network cannot read that, the size nearest above it
        that the network can read.

    Raises:
        ACKDError: If the network cannot read the given size, or none of those that are tried.
    """
    wanted = given or stated or data.input_size
    problem = _problem(network, wanted, channels)
    if problem is None:
        return wanted
    config = getattr(network, "pretrained_cfg", None)
    published = tuple(config.get("input_size") or ())[-2:] if isinstance(config, dict) else ()
    side = max(height_width(wanted))
    nearest = sorted(_SIDES, key=lambda each: (each < side, abs(each - side)))
    candidates: list[ImageSize] = [*([(published[0], published[1])] if len(published) == 2 else []), *nearest]
    size = next((each for each in candidates if _problem(network, each, channels) is None), None)
    if size is not None and given is None:
        return size
    words = f"{name} cannot read images of {_words(wanted)} pixels ({problem})"
    if size is None and (count := _only_batch(network, wanted, channels)) is not None:
        raise ACKDError(
            f"{name} runs on {count} {'images' if count > 1 else 'image'} at once and on no other number ({problem}); "
            "let it read batches of any size (torch.export: give dynamic_shapes)"
        )
    if size is None:
        raise ACKDError(
            f"{words}, nor of any other size that was tried; check its forward, and give a network whose images have "
            f"another number of channels than {channels} an attribute image_channels{hooks_remedy(network)}"
        )
    sizes = dict.fromkeys([_words(size), *_readable(network, channels)])
    raise ACKDError(f"{words}; set input_size to a size that it can read, such as {', '.join(list(sizes)[:6])}")


def _readable(network: nn.Module, channels: int) -> list[str]:
    return [_words(side) for side in _SIDES if _problem(network, side, channels) is None]


def _problem(network: nn.Module, size: ImageSize, channels: int) -> str | None:
    try:
        probe(network, size, channels=channels)
    except Exception as error:  # a network can refuse a size in any way
        reason = error if error.__cause__ is None else error.__cause__  # what the network itself says
        return first_line(reason)
    return None


@torch.no_grad()
def _only_batch(network: nn.Module, size: ImageSize, channels: int) -> int | None:
    """Return the one number of images that a network runs on, as after torch.export; None if none is found."""
    for copied, image in examples(network, size, channels=channels):
        for count in _BATCHES:
            with contextlib.suppress(Exception):
                copied(image[:1].expand(count, *image.shape[1:]).contiguous())
                return count
    return None


def _words(size: ImageSize) -> str:
    return " x ".join(map(str, height_width(size)))


class Conversion(nn.Module):
    """Convert images of the data to those that a network expects: channels, normalisation, size.

    Images with one channel are repeated for a network that reads three, and colours become their luminance (ITU-R
    BT.601) for one that reads one.

    Args:
        own: Images that the network expects. Without statistics, the normalisation stays that of the data.
        data: Channels, size and normalisation of the data; None converts nothing.
        channels: Channels that the network reads; None for those of the data.
        name: Name of the network in messages.

    Attributes:
        notes: What is done, in words.

    Raises:
        ACKDError: If the channels cannot be converted.
    """

    def __init__(
        self,
        own: Preprocessing | None = None,
        data: DataInfo | None = None,
        *,
        channels: int | None = None,
        name: str = "the teacher",
    ) -> None:
        super().__init__()
        self.own = own or Preprocessing()
        self.size: tuple[int, int] | None = None
        self.mode: Interpolation = self.own.interpolation or "bilinear"
        self.repeats = 1
        self.notes: list[str] = []
        for buffer in ("mix", "scale", "shift"):
            self.register_buffer(buffer, None, persistent=False)
        self.mix: Tensor | None
        self.scale: Tensor | None
        self.shift: Tensor | None
        if data is None:
            return
        if self.own.input_size is not None and height_width(self.own.input_size) != height_width(data.input_size):
            self.size = height_width(self.own.input_size)
            self.notes.append(
                f"images are resized from {_words(data.input_size)} to {_words(self.size)} pixels ({self.mode})"
            )
        self._match_channels(data.image_shape[0], channels or data.image_shape[0], data, name)
        self._match_statistics(data, channels or data.image_shape[0], name)

    def _match_channels(self, given: int, needed: int, data: DataInfo, name: str) -> None:
        if given == needed:
            return
        if given != 1 and (given, needed) != (3, 1):
            raise ACKDError(
                f"{name} reads images with {needed} channels and the data have {given}; choose a teacher with {given}, "
                "or with 3 for grey images and 1 for colours"
            )
        if given == 1:
            self.repeats = needed
            self.notes.append(f"the one channel of the data is repeated {needed} times")
            return
        self.notes.append("colours are turned into grey (luminance)")
        weights = torch.tensor(_LUMINANCE)
        if data.mean is not None and data.std is not None and self.own.mean is not None:  # pixels again
            weights = weights * torch.tensor(data.std)
        self.mix = weights.view(1, 3, 1, 1)

    def _match_statistics(self, data: DataInfo, needed: int, name: str) -> None:
        own = self.own
        if own.mean is None or own.std is None:
            self.notes.append("its preprocessing is unknown, so it gets images normalised as for the student")
            return
        if len(own.mean) != needed:
            raise ACKDError(f"mean has {len(own.mean)} values and {name} reads {needed} channels; give one for each")
        if data.mean is None or data.std is None:
            self.notes.append(
                "the normalisation of the data is unknown, so its images are not converted to its own (pass mean and "
                "std of the data)"
            )
            return
        origin = f" ({own.origin})" if own.origin else ""
        before: tuple[float, ...]
        factor: tuple[float, ...]
        if self.mix is not None:  # pixels without the data's offset
            offset = math.fsum(weight * mean for weight, mean in zip(_LUMINANCE, data.mean, strict=True))
            before, factor = (offset,), (1.0,)
        else:
            before, factor = _repeated(data.mean, needed), _repeated(data.std, needed)
        if (before, factor) == (own.mean, own.std):
            return
        rounded = [[round(each, 4) for each in values] for values in (own.mean, own.std)]
        self.notes.append(f"images are normalised with mean {rounded[0]} and std {rounded[1]}{origin}")
        data_mean, data_std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            for values in (before, factor, own.mean, own.std)
        )
        self.scale, self.shift = data_std / own_std, (data_mean - own_mean) / own_std

    def forward(self, image: Tensor) -> Tensor:
        """Convert images ``B x C x H x W``."""
        if self.mix is not None:
            image = (image * self.mix).sum(dim=1, keepdim=True)
        if self.scale is not None and self.shift is not None:
            image = image * self.scale + self.shift  # one channel becomes as many as there are scales
        elif self.repeats > 1:
            image = image.expand(-1, self.repeats, -1, -1)
        if self.size is None:
            return image
        if self.mode == "nearest":
            return F.interpolate(image, size=self.size, mode="nearest-exact")
        exact = image if image.dtype == torch.float64 else image.float()  # few devices have it in half precision
        resized = F.interpolate(exact, size=self.size, mode=self.mode, antialias=True, align_corners=False)
        return resized.to(image.dtype)


def _repeated(values: Sequence[float], times: int) -> tuple[float, ...]:
    return tuple(values) * times if len(values) == 1 else tuple(values)
