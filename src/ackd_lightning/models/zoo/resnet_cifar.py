"""ResNets for small images: a 3x3 stem and three stages of basic blocks."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ackd_lightning.models.features import StagePlan, pooled
from ackd_lightning.models.zoo._layers import conv1x1, conv3x3, init_convolutions


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, added before the last ReLU.

    The shortcut is the identity if the shape stays the same, and otherwise a strided 1x1 convolution with BatchNorm
    (option B of He et al.).

    Shapes: (B, inputs, H, W) to (B, outputs, H / stride, W / stride).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, Figure 5 left.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv1x1(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Return relu(residual + shortcut) of ``features`` (B, inputs, H, W)."""
        residual = self.relu(self.bn1(self.conv1(features)))
        residual = self.bn2(self.conv2(residual))
        activated: Tensor = self.relu(residual + self.downsample(features))
        return activated


class CifarResNet(nn.Module):
    """ResNet with ``depth`` = 6n + 2 layers: a 3x3 stem and three stages of n basic blocks.

    Stage outputs for 32x32 images are 32x32, 16x16 and 8x8 after the ReLU; other image sizes work too, because the
    pooling is global. Parameters have the names of RepDistiller's public CIFAR-100 checkpoints, which load unchanged.

    Shapes: images (B, 3, H, W) to logits (B, K).

    Args:
        num_classes: Number K of classes.
        depth: Number of layers: 8, 14, 20, 32, 44, 56 or 110.
        widths: Channels of the stem and of each stage.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2, with option B
        shortcuts; ``resnet8x4`` and ``resnet32x4`` from Tian et al., arXiv:1910.10699.
    """

    stage_plan: ClassVar[StagePlan] = StagePlan(("relu", "layer1", "layer2", "layer3"), classifier="fc")

    image_size = 32

    def __init__(self, num_classes: int, *, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64)) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of ``images`` (B, 3, H, W)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.fc(pooled(features))
        return logits


def _stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
    """Stack ``blocks`` basic blocks, the first of which changes the channels and the resolution."""
    first = BasicBlock(inputs, outputs, stride=stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
