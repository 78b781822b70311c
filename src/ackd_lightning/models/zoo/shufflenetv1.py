"""ShuffleNet (version 1) with three groups, for small images."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ackd_lightning.models.features import StagePlan, pooled
from ackd_lightning.models.zoo._layers import conv1x1, conv3x3

_GROUPS = 3
_STEM = 24


class ShuffleChannels(nn.Module):
    """Interleave the channels of equal groups, so that the next grouped convolution mixes them.

    Shapes: (B, C, H, W) to (B, C, H, W); channel ``g * C / groups + i`` moves to ``i * groups + g``.

    Args:
        groups: Number of groups; 1 keeps the order.

    Source:
        Zhang et al., "ShuffleNet", arXiv:1707.01083, Figure 1.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, features: Tensor) -> Tensor:
        """Return ``features`` (B, C, H, W) with interleaved channels."""
        grouped = features.reshape(features.shape[0], self.groups, -1, *features.shape[2:])
        return grouped.transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """Grouped 1x1 convolution, shuffle, depthwise 3x3 convolution, grouped 1x1 convolution, and a shortcut.

    At stride 2 the average-pooled input is appended to the channels; at stride 1 the input is added. A ReLU follows the
    depthwise convolution, as in the public CIFAR checkpoints (the paper has none there).

    Shapes: (B, inputs, H, W) to (B, outputs, H / stride, W / stride).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output, those of the shortcut included.
        stride: Stride of the depthwise convolution, 1 or 2.

    Source:
        Zhang et al., "ShuffleNet", arXiv:1707.01083, Figure 2 (b) and (c).
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.appends = stride == 2
        own = outputs - inputs if self.appends else outputs
        inner = own // 4
        groups = 1 if inputs == _STEM else _GROUPS  # the stem has too few channels to be split
        self.conv1 = conv1x1(inputs, inner, groups=groups)
        self.bn1 = nn.BatchNorm2d(inner)
        self.shuffle1 = ShuffleChannels(groups)
        self.conv2 = conv3x3(inner, inner, stride=stride, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, own, groups=_GROUPS)
        self.bn3 = nn.BatchNorm2d(own)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.AvgPool2d(3, stride=2, padding=1) if self.appends else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return the unit's output for ``features`` (B, inputs, H, W), after its ReLU."""
        inner = self.shuffle1(self.relu(self.bn1(self.conv1(features))))
        inner = self.relu(self.bn2(self.conv2(inner)))
        own: Tensor = self.bn3(self.conv3(inner))
        shortcut: Tensor = self.shortcut(features)
        joined = torch.cat((own, shortcut), dim=1) if self.appends else own + shortcut
        activated: Tensor = self.relu(joined)
        return activated


class CifarShuffleNetV1(nn.Module):
    """ShuffleNet with three groups for 32x32 images: a 1x1 stem without stride and stages of 4, 8 and 4 units.

    Stage outputs have 240, 480 and 960 channels at 16x16, 8x8 and 4x4. Weights have torch's default initialisation, as
    in the networks of the published results.

    Shapes: images (B, 3, H, W) to logits (B, K).

    Args:
        num_classes: Number K of classes.

    Source:
        Zhang et al., "ShuffleNet", arXiv:1707.01083, Table 1 (g = 3), in the variant of Tian et al., arXiv:1910.10699;
        parameter names as in the public checkpoints of RepDistiller.
    """

    stage_plan: ClassVar[StagePlan] = StagePlan(("relu", "layer1", "layer2", "layer3"), classifier="linear")

    image_size = 32

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv1x1(3, _STEM)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _stage(_STEM, 240, units=4)
        self.layer2 = _stage(240, 480, units=8)
        self.layer3 = _stage(480, 960, units=4)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of ``images`` (B, 3, H, W)."""
        features = self.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        logits: Tensor = self.linear(pooled(features))
        return logits


def _stage(inputs: int, outputs: int, *, units: int) -> nn.Sequential:
    """Stack ``units`` shuffle units, the first of which halves H and W and appends its input."""
    first = ShuffleUnit(inputs, outputs, stride=2)
    return nn.Sequential(first, *(ShuffleUnit(outputs, outputs, stride=1) for _ in range(units - 1)))
