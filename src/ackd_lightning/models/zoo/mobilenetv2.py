"""MobileNetV2 for small images, in the variant of the knowledge distillation benchmarks."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ackd_lightning.models.features import StagePlan, pooled
from ackd_lightning.models.zoo._layers import conv1x1, conv3x3, init_convolutions

# expansion, channels at width 1, blocks, stride of the first block
_SETTING = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expanding 1x1 convolution, depthwise 3x3 convolution and linear projection, plus the input if its shape fits.

    The expansion is kept even if its factor is 1, and activations are plain ReLU. Both are as in the public CIFAR
    checkpoints, unlike in torchvision's network.

    Shapes: (B, inputs, H, W) to (B, outputs, H / stride, W / stride); the output may be negative.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the depthwise convolution.
        expansion: Ratio of the inner channels to ``inputs``.

    Source:
        Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381, Table 1.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            conv1x1(inputs, inner),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv3x3(inner, inner, stride=stride, groups=inner),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            conv1x1(inner, outputs),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the projected ``features`` (B, inputs, H, W), plus themselves if the shape stays the same."""
        projected: Tensor = self.conv(features)
        return features + projected if self.adds else projected


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 with expansion 6 for 32x32 images.

    Channels are ``int(channels * width)``, not rounded to multiples of 8. The stem and three groups of blocks have
    stride 2, so that a 32x32 image becomes a 2x2 map. Weights of torchvision's ``mobilenet_v2`` do not fit.

    Shapes: images (B, 3, H, W) to logits (B, K).

    Args:
        num_classes: Number K of classes.
        width: Factor on the channels, 0.5 or 1.4 in the benchmarks; the last layer never has fewer than 1280.

    Source:
        Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381, Table 2, in the
        variant of Tian et al., arXiv:1910.10699; parameter names as in the public checkpoints of RepDistiller.
    """

    stage_plan: ClassVar[StagePlan] = StagePlan(
        ("conv1", "blocks.1", "blocks.2", "blocks.4", "conv2"), classifier="classifier"
    )

    image_size = 32

    def __init__(self, num_classes: int, *, width: float) -> None:
        super().__init__()
        channels = int(32 * width)
        last = int(1280 * max(width, 1.0))
        self.conv1 = nn.Sequential(conv3x3(3, channels, stride=2), nn.BatchNorm2d(channels), nn.ReLU())
        self.blocks = nn.ModuleList()
        for expansion, full, repeats, stride in _SETTING:
            group = nn.Sequential()
            for index in range(repeats):
                outputs = int(full * width)
                group.append(
                    InvertedResidual(channels, outputs, stride=stride if index == 0 else 1, expansion=expansion)
                )
                channels = outputs
            self.blocks.append(group)
        self.conv2 = nn.Sequential(conv1x1(channels, last), nn.BatchNorm2d(last), nn.ReLU())
        head = nn.Linear(last, num_classes)
        self.classifier = nn.Sequential(head)
        init_convolutions(self)
        nn.init.normal_(head.weight, mean=0.0, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of ``images`` (B, 3, H, W)."""
        features = self.conv1(images)
        for group in self.blocks:
            features = group(features)
        logits: Tensor = self.classifier(pooled(self.conv2(features)))
        return logits
