"""Images as a trained network reads them: what evaluation in training did to them, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ackd_lightning.data.decoding import as_decoded, load_image
from ackd_lightning.data.pixels import Decoded, ImageFormat, convert, fit, to_tensor
from ackd_lightning.data.transforms import normalise
from ackd_lightning.deploy.description import Description
from ackd_lightning.errors import ACKDError
from ackd_lightning.types import height_width

AnyImage = str | Path | Image.Image | Tensor
"""Image file, PIL image, or ``C x H x W`` tensor: uint8, or float32 from 0 to 1."""


class Preprocessing:
    """Convert images to the input of a network, as evaluation in its training did.

    Args:
        description: What the network expects.

    Attributes:
        form: Size, channels and type of images before normalisation.

    Raises:
        ACKDError: If the file does not state mean and standard deviation.
    """

    def __init__(self, description: Description) -> None:
        if description.mean is None or description.std is None:
            raise ACKDError(
                f"the file of {description.model} does not state mean and std, so images cannot be normalised as in "
                "its training; export it from a run whose data have them"
            )
        self.mean, self.std = description.mean, description.std
        self.border = 1 / (description.crop_pct or 1.0)
        self.form = ImageFormat(
            height_width(description.input_size),
            description.channels,
            description.value_range,
            description.background,
            description.pixels == "float32",
        )

    def pixels(self, image: AnyImage) -> Tensor:
        """Return an image as ``C x H x W`` before normalisation: uint8, or float32 from 0 to 1.

        Args:
            image: Image file, PIL image, or tensor of any size.

        Raises:
            ACKDError: If the file is not a whole image, or the image has channels that cannot be converted.
        """
        return self.fitted(self._decoded(image))

    def fitted(self, image: Decoded) -> Tensor:
        """Resize and crop an image that was decoded.

        Args:
            image: Image with the channels of ``form``.

        Returns:
            ``C x H x W`` before normalisation.
        """
        return to_tensor(fit(image, self.form.size, border=self.border), self.form)

    def batch(self, images: Sequence[AnyImage]) -> Tensor:
        """Return images as ``B x C x H x W`` float32, normalised.

        Args:
            images: B images, at least one.
        """
        return self.normalised(torch.stack([self.pixels(each) for each in images]))

    def normalised(self, pixels: Tensor) -> Tensor:
        """Normalise images.

        Args:
            pixels: ``B x C x H x W`` uint8, or float32 from 0 to 1.

        Returns:
            ``B x C x H x W`` float32.
        """
        return normalise(pixels, self.mean, self.std)

    def raw(self, normalised: Tensor) -> Tensor:
        """Undo `normalised`; exact for images that were uint8.

        Args:
            normalised: ``B x C x H x W`` float32.

        Returns:
            ``B x C x H x W`` uint8.
        """
        std, mean = (torch.tensor(each, device=normalised.device)[:, None, None] for each in (self.std, self.mean))
        return ((normalised * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def _decoded(self, image: AnyImage) -> Decoded:
        if isinstance(image, str | Path):
            path = Path(image).expanduser()
            if not path.is_file():
                raise ACKDError(f"image {path} does not exist; correct the path")
            return convert(load_image(path), self.form, str(path))
        if isinstance(image, Image.Image):
            return convert(as_decoded(image), self.form, "an image")
        if not isinstance(image, Tensor):
            raise ACKDError(
                f"an image is of the type {type(image).__name__}; give a file, an image of Pillow, or a tensor"
            )
        return self._tensor(image)

    def _tensor(self, image: Tensor) -> Decoded:
        if image.ndim != 3 or 0 in image.shape:
            raise ACKDError(f"an image is a tensor of shape {tuple(image.shape)}; it must be C x H x W")
        if image.dtype not in (torch.uint8, torch.float32):
            raise ACKDError(f"an image is a tensor of {image.dtype}; it must be uint8, or float32 from 0 to 1")
        array = np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())
        if array.dtype == np.uint8 and array.shape[2] in (1, 3):  # converted as an image in a file
            return convert(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), self.form, "an image")
        form = self.form if array.dtype == np.uint8 else replace(self.form, value_range=None)  # scaled already
        return convert(array, form, "an image")
