"""Wide residual networks for small images, with pre-activation blocks."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ackd_lightning.models.features import StagePlan, pooled
from ackd_lightning.models.zoo._layers import conv1x1, conv3x3, init_convolutions


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, twice, and a shortcut without normalisation.

    If the number of channels changes, both paths share the first BatchNorm and ReLU and the shortcut is a 1x1
    convolution; if not, the shortcut is the block's input itself.

    Shapes: (B, inputs, H, W) to (B, outputs, H / stride, W / stride); the output may be negative.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: Stride of the first convolution and of the shortcut; 1 if the number of channels stays the same.

    Source:
        Zagoruyko and Komodakis, "Wide Residual Networks", arXiv:1605.07146, Figure 1 (c) without dropout.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.widens = inputs != outputs
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(inputs, outputs, stride=stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        # named as in the public checkpoints
        self.convShortcut: nn.Module = conv1x1(inputs, outputs, stride=stride) if self.widens else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return residual + shortcut of ``features`` (B, inputs, H, W)."""
        activated: Tensor = self.relu1(self.bn1(features))
        residual: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        shortcut: Tensor = self.convShortcut(activated if self.widens else features)
        return residual + shortcut


class BlockGroup(nn.Module):
    """One stage of a wide residual network; a class of its own because public checkpoints name its blocks ``layer.N``.

    Shapes: (B, inputs, H, W) to (B, outputs, H / stride, W / stride).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        blocks: Number of blocks.
        stride: Stride of the first block.
    """

    def __init__(self, inputs: int, outputs: int, *, blocks: int, stride: int) -> None:
        super().__init__()
        first = PreActivationBlock(inputs, outputs, stride=stride)
        self.layer = nn.Sequential(first, *(PreActivationBlock(outputs, outputs) for _ in range(blocks - 1)))

    def forward(self, features: Tensor) -> Tensor:
        """Return the stage's output for ``features`` (B, inputs, H, W)."""
        outputs: Tensor = self.layer(features)
        return outputs


class WideResNet(nn.Module):
    """Wide residual network WRN-``depth``-``widen`` with ``depth`` = 6n + 4.

    Stage outputs are residual sums, before the next BatchNorm and ReLU; that of the last stage is after the final pair.
    They are 32x32, 16x16 and 8x8 for 32x32 images; other image sizes work too, because the pooling is global.

    Shapes: images (B, 3, H, W) to logits (B, K).

    Args:
        num_classes: Number K of classes.
        depth: Number of layers: 16, 28 or 40.
        widen: Factor on the widths 16, 32 and 64 of the three stages; the stem keeps 16.

    Source:
        Zagoruyko and Komodakis, "Wide Residual Networks", arXiv:1605.07146, Table 1; parameter names as in the public
        CIFAR-100 checkpoints of RepDistiller.
    """

    stage_plan: ClassVar[StagePlan] = StagePlan(("conv1", "block1", "block2", "relu"), classifier="fc")

    image_size = 32

    def __init__(self, num_classes: int, *, depth: int, widen: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = conv3x3(3, 16)
        self.block1 = BlockGroup(16, 16 * widen, blocks=blocks, stride=1)
        self.block2 = BlockGroup(16 * widen, 32 * widen, blocks=blocks, stride=2)
        self.block3 = BlockGroup(32 * widen, 64 * widen, blocks=blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * widen, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of ``images`` (B, 3, H, W)."""
        features = self.block3(self.block2(self.block1(self.conv1(images))))
        features = self.relu(self.bn1(features))
        logits: Tensor = self.fc(pooled(features))
        return logits
