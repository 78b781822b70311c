"""`CustomImagesDataModule`: what all data modules for images of one's own share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import ImageColor
from torch import Tensor

from ackd_lightning.data.datasets import IN_MEMORY
from ackd_lightning.data.decoding import label, load_image
from ackd_lightning.data.messages import say
from ackd_lightning.data.pixels import ImageFormat, is_deep
from ackd_lightning.data.sampling import TEST_SPLIT_SEED, Part, stratified_split
from ackd_lightning.data.sources import Files, Records, Source, name_keys, say_without
from ackd_lightning.data.stored import StoredDataModule
from ackd_lightning.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.types import height_width
from ackd_lightning.validation import Positive, Range, checked

Side = Annotated[int, Range(8, 4096)]

_TEST_SHARE = 0.2
_GREY = ((sum(IMAGENET_MEAN) / 3,), (sum(IMAGENET_STD) / 3,))


class CustomImagesDataModule(StoredDataModule):
    """Images of one's own, of any size, mode and depth.

    Up to 64 pixels the images are decoded once, kept in memory and augmented by zero-padded crop and mirror image (an
    image of another size is resized until it covers the input, and cropped in the centre); larger ones are read by
    worker processes with random resized crops. A photo is turned as its camera states (EXIF). Images of more than 8
    bits are kept as float32; the first training image decides, and a line says how many images have another depth.

    Args:
        root: Folder of the data.
        image_size: Side in pixels of the network's square input, or its height and width.
        channels: Number of channels. Other images are converted to 1 (grey) or 3 (RGB); any other number must be that
            of the files (PNG and TIFF with up to 4, ``.npy`` arrays and TIFF by tifffile with up to 16).
        mean: Mean of each channel, of pixels in 0 to 1. By default ImageNet's, their average for grey images; needed
            for any other number of channels.
        std: Standard deviation of each channel, as ``mean``.
        value_range: Pixel values that become 0 and 1, such as [0, 4095] for 12 bits in files of 16; NaN becomes 0.
            None for the range of the file's type: 255 for 8 bits, 65535 for 16 bits, 0 to 1 for floats.
        background: Colour that shows through transparent pixels: a name, or ``rgb(128,128,128)``.
        options: Argument ``cache``, and those of [`ImageDataModule`][ackd_lightning.data.ImageDataModule].
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        *,
        image_size: Side | tuple[Side, Side] = 32,
        channels: Annotated[int, Range(1, 16)] = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[Positive] | None = None,
        value_range: tuple[float, float] | None = None,
        background: str = "white",
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        if not isinstance(image_size, int) and len(image_size) != 2:
            raise ACKDError(f"image_size is {list(image_size)}: give one side, or height and width")
        self.input_size = image_size if isinstance(image_size, int) else (image_size[0], image_size[1])
        self.channels = channels
        self.mean, self.std = _normalisation(channels, mean, std)
        if value_range is not None and (len(value_range) != 2 or value_range[0] >= value_range[1]):
            raise ACKDError(
                f"value_range is {list(value_range)}: give the values that become 0 and 1, such as [0, 4095]"
            )
        self.value_range = None if value_range is None else (float(value_range[0]), float(value_range[1]))
        try:
            ImageColor.getrgb(background)
        except ValueError:
            raise ACKDError(f"background is {background!r}: give a colour, such as white or rgb(128,128,128)") from None
        self.background = background
        self._deep: bool | None = None

    def _split_keys(self, source: Source) -> Tensor | None:
        return name_keys(source)

    @property
    def _own_validation(self) -> bool:
        return self._has_validation and not self.val_is_test

    @property
    def _validation_share(self) -> float:
        return 1.0

    @property
    def image_format(self) -> ImageFormat:
        """What image files become."""
        return ImageFormat(
            height_width(self.input_size), self.channels, self.value_range, self.background, bool(self._deep)
        )

    def _read(self, files: Files | Records, folder: Path, part: str) -> Source:
        """Decode small images, or check the files of large ones."""
        if self._deep is None and len(files):
            first = files.file(0)
            self._deep = is_deep(load_image(first))
            if self._deep:
                say(f"images are kept as float32, since the first one, {label(first)}, has more than 8 bits")
        if max(height_width(self.input_size)) <= IN_MEMORY:
            return self._decoded(files, folder, part)
        return self._checked(files, folder, part)


def say_test_is_validation(place: object, *, holds_out: bool) -> None:
    """Say that data without a test part are tested on their validation part.

    Args:
        place: What the images were read from.
        holds_out: Whether training images are held out.
    """
    held = "training images are held out to validate" if holds_out else "no training image is held out"
    say(f"{place} has no test part: its validation part is the test set, and {held}")


def say_shared(part: str, shared: Sequence[str], noun: str = "image") -> None:
    """Say which images of the validation or test part are trained on.

    Args:
        part: ``val`` or ``test``.
        shared: Names that both parts have; none: nothing is said.
        noun: What has these names.
    """
    if shared:
        verb = "is" if len(shared) == 1 else "are"
        say(f"{count_of(len(shared), noun)} of the {part} part {verb} in the training part too, such as {min(shared)}")


def split_test(
    targets: Tensor, part: Part, place: object, *, names: Sequence[str], keys: Tensor | None = None
) -> Tensor:
    """Split data without a test part: a stratified fifth of the labelled images, always the same, is the test set.

    With keys that depend on the names of files, each image that is added later moves at most one other.

    Args:
        targets: ``N`` int64 class indices, -1 without a label.
        part: Part that is wanted; the test part says what it was taken from.
        place: What the images were read from, for the line about it.
        names: Name of each class.
        keys: Result of `name_keys`; None: the positions decide.

    Returns:
        Sorted positions (int64) of the part.

    Raises:
        ACKDError: If the test part would be empty.
    """
    labelled = (targets >= 0).nonzero().flatten()
    chosen = None if keys is None else keys[labelled]
    kept, held_out = stratified_split(targets[labelled], _TEST_SHARE, split_seed=TEST_SPLIT_SEED, keys=chosen)
    if part == "test":
        if not len(held_out):
            raise ACKDError(
                f"{place} has no test part, and too few images of each class to take a fifth of them; add images, or "
                "test images of their own"
            )
        say(
            f"{place} has no test part: {len(held_out):,} images, always the same fifth of each class, are the test set"
        )
        say_without(targets, labelled[held_out], names, f"the test set of {place}")
        return labelled[held_out]
    return torch.cat([labelled[kept], (targets < 0).nonzero().flatten()]).sort().values


def _normalisation(
    channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    usual = {1: _GREY, 3: (IMAGENET_MEAN, IMAGENET_STD)}.get(channels)
    found = []
    for name, values, default in (("mean", mean, usual and usual[0]), ("std", std, usual and usual[1])):
        chosen = default if values is None else tuple(values)
        if chosen is None:
            raise ACKDError(f"{name} is not given and channels is {channels}: give one value for each channel")
        if len(chosen) != channels:
            raise ACKDError(
                f"{name} has {len(chosen)} values and channels is {channels}: give one value for each channel"
            )
        found.append(chosen)
    return found[0], found[1]
