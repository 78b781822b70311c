"""Networks of ACN: a generator of images that stay near their originals, and a discriminator of images.

Both are our design: the abstract, the only part of the paper that was available to us, names a "Weakly Residual
Connection" and generative adversarial networks, and describes neither.
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
from ackd_lightning.random import image_keys, stateless_bits, stateless_uniform

ResidualConnection = Literal["convex", "learned", "additive"]
_STREAM = 0x41434E  # keeps this noise apart from all other random numbers


def image_noise(index: Tensor, epoch: int, height: int, width: int) -> Tensor:
    """Return one channel of noise for every image, which depends only on the epoch, the image and the pixel.

    The noise depends neither on the device nor on the other images of the batch.

    Args:
        index: Positions in the training set, ``B`` int64; for an unknown position (-1) the place in the batch is used.
        epoch: Number of the epoch, from 0.
        height: Height H in pixels.
        width: Width W in pixels.

    Returns:
        ``B x 1 x H x W`` float32, uniform in [-1, 1).
    """
    image = stateless_bits(_STREAM, epoch, image_keys(index))
    pixel = torch.arange(height * width, device=index.device)
    return (2 * stateless_uniform(image[:, None], pixel[None, :]) - 1).view(-1, 1, height, width)


def without_weight_cache(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context with the current mixed precision, but without the cache of converted weights.

    In one training step a generator runs with and without gradient, and its optimizer steps in between. The cache would
    return weights without gradient, or old ones.

    Args:
        device: Device of the tensors.
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
    """Two 3x3 convolutions with a residual connection.

    Args:
        channels: Channels C of input and output.
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
        """Return the feature ``B x C x H x W`` plus the result of the convolutions."""
        corrected: Tensor = feature + self.body(feature)
        return corrected


class Generator(nn.Module):
    r"""Generator of an image \(\tilde x\) from an image x and noise e, with a weakly residual connection.

    * ``convex``: \(\tilde x = \rho x + (1 - \rho)\,G(x, e)\), which bounds \(|\tilde x - x|\) by \(1 - \rho\) times the
      range of an image
    * ``learned``: the same, with \(\rho\) in (0, 1) a parameter of the generator
    * ``additive``: \(\tilde x = \mathrm{clamp}(\rho x + G(x, e))\)

    G is fully convolutional: three convolutions (strides 1, 2, 2), four residual blocks, two stages that double the
    size (nearest neighbour, then a convolution), and a last convolution whose tanh covers the range of an image. Any
    height and width is allowed. Without dropout and running statistics, training and evaluation mode are equal.

    Args:
        low: Smallest pixel value of each channel.
        high: Largest pixel value of each channel.
        width: Channels of the first convolution; inner ones have up to four times as many.
        residual: Kind of the connection.
        rho: Share of the original; the initial value of a learned share.

    Raises:
        ACKDError: If a smallest value is not below the largest.
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
                f"pixels are from {list(low)} to {list(high)} for the generator; every channel needs a range with low "
                "below high (check mean and std of the data)"
            )
        self.low: Tensor
        self.high: Tensor
        for name, values in (("low", low), ("high", high)):  # known from the data, therefore not in a checkpoint
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
        """Share of the original in a generated image, a scalar."""
        return self.share.sigmoid() if self.residual == "learned" else self.share

    def paint(self, image: Tensor, noise: Tensor) -> Tensor:
        """Return G(x, e), the image before the connection.

        Args:
            image: Images ``B x C x H x W``.
            noise: Noise ``B x 1 x H x W``.

        Returns:
            Images ``B x C x H x W`` float32 in the pixel range.
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
        """Apply the weakly residual connection.

        Args:
            image: Images ``B x C x H x W``.
            painted: Result of ``paint``, of the same shape.

        Returns:
            Images of the same shape, float32; gradients flow into both and into a learned rho.
        """
        image = image.float()
        if self.residual == "additive":
            return (self.rho * image + painted).clamp(self.low, self.high)
        return self.rho * image + (1 - self.rho) * painted

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """Return the generated images.

        Args:
            image: Normalised images ``B x C x H x W``.
            noise: Noise ``B x 1 x H x W`` of ``image_noise``.

        Returns:
            Images ``B x C x H x W`` of the same type.
        """
        return self.connect(image, self.paint(image, noise)).to(image.dtype)


class _Conv(nn.Conv2d):
    """Convolution whose weight is spectrally normalised in float32 also under mixed precision."""

    def forward(self, feature: Tensor) -> Tensor:
        with _in_float32(feature.device):
            weight = self.weight
        result: Tensor = self._conv_forward(feature, weight, self.bias)
        return result


class ImageDiscriminator(nn.Module):
    """Discriminator that tells for every patch whether the image is real: four spectrally normalised 3x3 convolutions.

    The strides are 2, 2, 1, 1, so a patch has 23 x 23 pixels, with LeakyReLU between. Any height and width is allowed.
    In training mode every pass updates the vectors of the spectral norm, in evaluation mode none does.

    Args:
        channels: Channels C of the images.
        width: Channels of the first convolution; the third has four times as many.
    """

    def __init__(self, channels: int = 3, *, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        plan = ((channels, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 1), (4 * width, 1, 1))
        for entering, leaving, stride in plan:
            layers += [spectral_norm(_Conv(entering, leaving, 3, stride, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of every patch for being real.

        Args:
            image: Images ``B x C x H x W``.

        Returns:
            ``B x N`` float32, N patches.
        """
        with without_weight_cache(image.device):
            logits: Tensor = self.layers(image)
        return logits.float().flatten(1)
