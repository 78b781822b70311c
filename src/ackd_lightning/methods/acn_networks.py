"""A generator of images that stay near the ones they are made from, and a discriminator of images (for ACN).

Both are of our design: of the paper only the abstract was within reach, which names a "Weakly Residual Connection" and
generative adversarial networks, and describes neither.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn.utils.parametrizations import spectral_norm

from ackd_lightning.errors import ACKDError
from ackd_lightning.random import keyed_bits, keyed_uniform

ResidualConnection = Literal["convex", "learned", "additive"]
RESIDUAL_CONNECTIONS = ("convex", "learned", "additive")
_STREAM = 0x41434E  # keeps the noise apart from other draws with equal keys


def image_noise(index: Tensor, epoch: int, height: int, width: int) -> Tensor:
    """One channel of noise for every image: a function of the epoch, the image and the pixel alone.

    So it depends neither on the device nor on the other images of the batch.

    Args:
        index: ``B`` int64 positions in the training set; an image whose position is unknown (-1) has its noise from
            its place in the batch.
        epoch: from 0.
        height: H.
        width: W.

    Returns:
        ``B x 1 x H x W`` float32, uniform in [-1, 1).
    """
    place = torch.arange(len(index), device=index.device)
    image = keyed_bits(_STREAM, epoch, torch.where(index < 0, place, index))
    pixel = torch.arange(height * width, device=index.device)
    return (2 * keyed_uniform(image[:, None], pixel[None, :]) - 1).view(-1, 1, height, width)


def without_weight_cache(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Mixed precision as it is set outside, but for the cache of converted weights.

    In one training step a generator runs without gradient and with it, and its optimizer steps in between; the cache
    would hand out weights that have no gradient, or old ones.

    Args:
        device: of the tensors.
    """
    kind = device.type
    if not (is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


def _in_float32(device: torch.device) -> contextlib.AbstractContextManager[None]:
    kind = device.type
    return torch.autocast(kind, enabled=False) if is_autocast_available(kind) else contextlib.nullcontext()


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)  # keeps no running statistics


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the feature goes.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _norm(channels),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Feature plus correction, ``B x C x H x W`` both."""
        corrected: Tensor = feature + self.body(feature)
        return corrected


class Generator(nn.Module):
    r"""Makes an image \(\tilde x\) out of an image x and noise e, with a weakly residual connection.

    * ``convex``: \(\tilde x = \rho x + (1 - \rho)\,G(x, e)\), which bounds \(|\tilde x - x|\) by \(1 - \rho\) times the
      range of an image
    * ``learned``: the same, \(\rho\) in (0, 1) being a parameter of the generator
    * ``additive``: \(\tilde x = \mathrm{clamp}(\rho x + G(x, e))\)

    G is fully convolutional: three convolutions (strides 1, 2, 2), four residual blocks, two stages that double the
    size (nearest neighbour, then a convolution), and a last convolution whose tanh covers the range of an image. Any
    height and width will do. It has no dropout and no running statistics, so training and evaluation mode are one.

    Args:
        low: smallest value of an image per channel.
        high: largest value of an image per channel.
        width: channels of the first convolution; the inner ones have up to four times as many.
        residual: the connection.
        rho: share of the original; where the learned one begins.

    Raises:
        ACKDError: for a range without extent.
    """

    def __init__(
        self,
        low: Sequence[float] = (-1.0, -1.0, -1.0),
        high: Sequence[float] = (1.0, 1.0, 1.0),
        *,
        width: int = 32,
        residual: ResidualConnection = "convex",
        rho: float = 0.5,
    ) -> None:
        super().__init__()
        if len(low) != len(high) or not low or not all(a < b for a, b in zip(low, high, strict=True)):
            raise ACKDError(
                f"images go from {list(low)} to {list(high)} for the generator; the data must give one range with low "
                "below high for every channel (check mean and std)"
            )
        self.low: Tensor
        self.high: Tensor
        for name, values in (("low", low), ("high", high)):  # known from the data, so not part of a checkpoint
            self.register_buffer(name, torch.tensor([float(each) for each in values]).view(1, -1, 1, 1), False)
        self.residual = residual
        self.share: Tensor
        if residual == "learned":
            self.share = nn.Parameter(torch.logit(torch.tensor(float(rho))))
        else:
            self.register_buffer("share", torch.tensor(float(rho)), persistent=False)
        channels, two, four = len(low), 2 * width, 4 * width
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(entering, leaving, 3, stride, 1, bias=False), _norm(leaving), nn.ReLU())
            for entering, leaving, stride in ((channels + 1, width, 1), (width, two, 2), (two, four, 2))
        )
        self.blocks = nn.Sequential(*(ResidualBlock(four) for _ in range(4)))
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(entering, leaving, 3, padding=1, bias=False), _norm(leaving), nn.ReLU())
            for entering, leaving in ((four, two), (two, width))
        )
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    @property
    def rho(self) -> Tensor:
        """Share of the original in what is made, a scalar."""
        return self.share.sigmoid() if self.residual == "learned" else self.share

    def paint(self, image: Tensor, noise: Tensor) -> Tensor:
        """G(x, e), before the connection.

        Args:
            image: ``B x C x H x W``.
            noise: ``B x 1 x H x W``.

        Returns:
            ``B x C x H x W`` float32 in the range of an image.
        """
        with without_weight_cache(image.device):
            feature, sizes = torch.cat([image, noise.to(image.dtype)], dim=1), []
            for stage in self.down:
                sizes.append(feature.shape[2:])
                feature = stage(feature)
            feature = self.blocks(feature)
            for stage, size in zip(self.up, reversed(sizes[1:]), strict=True):
                feature = stage(F.interpolate(feature, size=size, mode="nearest"))
            shade = self.last(feature).float().tanh()
        painted: Tensor = self.low + (self.high - self.low) * (shade + 1) / 2
        return painted

    def connect(self, image: Tensor, painted: Tensor) -> Tensor:
        """The weakly residual connection.

        Args:
            image: ``B x C x H x W``.
            painted: of equal shape.

        Returns:
            Of equal shape, float32; the gradient flows into both, and into a learned rho.
        """
        image = image.float()
        if self.residual == "additive":
            return (self.rho * image + painted).clamp(self.low, self.high)
        return self.rho * image + (1 - self.rho) * painted

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """The image that is made.

        Args:
            image: ``B x C x H x W``, normalised.
            noise: ``B x 1 x H x W``, such as ``image_noise`` gives.

        Returns:
            ``B x C x H x W`` of the image's type.
        """
        return self.connect(image, self.paint(image, noise)).to(image.dtype)


class _Conv(nn.Conv2d):
    """A convolution whose weight, spectrally normalised, is found in float32 under mixed precision, too."""

    def forward(self, feature: Tensor) -> Tensor:
        with _in_float32(feature.device):
            weight = self.weight
        result: Tensor = self._conv_forward(feature, weight, self.bias)
        return result


class ImageDiscriminator(nn.Module):
    """Says of every patch of an image whether it is a real one: four spectrally normalised 3x3 convolutions.

    Strides 2, 2, 1, 1, so a patch has 23 x 23 pixels; LeakyReLU between. Any height and width will do. In training mode
    every pass moves the vectors of the spectral norm, in evaluation mode none does.

    Args:
        channels: C of the images.
        width: channels of the first convolution; the third has four times as many.
    """

    def __init__(self, channels: int = 3, *, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        plan = ((channels, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 1), (4 * width, 1, 1))
        for entering, leaving, stride in plan:
            layers += [spectral_norm(_Conv(entering, leaving, 3, stride, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> Tensor:
        """Opinion of every patch.

        Args:
            image: ``B x C x H x W``.

        Returns:
            ``B x N`` float32 logits of being real.
        """
        with without_weight_cache(image.device):
            opinion: Tensor = self.layers(image)
        return opinion.float().flatten(1)
