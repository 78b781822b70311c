"""What a student may get in place of its own classifier: projectors and classifiers of its teachers, kept with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import plan_for, pooled, staged_forward

AVERAGES = ("logits", "probabilities")


class Projector(nn.Sequential):
    """Three convolutions (1x1, 3x3, 1x1), each with BatchNorm and ReLU, from the student's channels to the teacher's.

    Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, 2022, section 3.2.

    Args:
        channels: of the student's feature map.
        out_channels: of the teacher's.
        factor: by which the two inner maps are narrower than the teacher's.
    """

    def __init__(self, channels: int, out_channels: int, *, factor: int = 2) -> None:
        inner = max(out_channels // factor, 1)
        layers: list[nn.Module] = []
        for entering, leaving, kernel in ((channels, inner, 1), (inner, inner, 3), (inner, out_channels, 1)):
            layers += [
                nn.Conv2d(entering, leaving, kernel, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(leaving),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class SharedClassifiers(nn.Module):
    """Predicts with the classifiers of one teacher or several, each behind a projector of its own.

    Args:
        channels: C of the student's last feature map.
        teachers: ``(C, H, W)`` of every teacher's last feature map.
        num_classes: K.
        factor: of the projectors.
        average: what the mean over several teachers is taken of: ``logits`` or ``probabilities``.

    Raises:
        ACKDError: for a size that is no whole number above 0, no teachers, and an unknown average.
    """

    def __init__(
        self,
        channels: int,
        teachers: Sequence[Sequence[int]],
        num_classes: int,
        *,
        factor: int = 2,
        average: str = "logits",
    ) -> None:
        super().__init__()
        self.sizes = tuple(tuple(shape) for shape in teachers)
        if not self.sizes or any(len(shape) != 3 for shape in self.sizes):
            raise ACKDError(f"teachers of a shared classifier are {self.sizes}; give channels, height, width of each")
        numbers = [("channels", channels), ("num_classes", num_classes), ("factor", factor)]
        numbers += [("a size in teachers", size) for shape in self.sizes for size in shape]
        for name, number in numbers:
            if type(number) is not int or number < 1:
                raise ACKDError(f"{name} of a shared classifier is {number!r}; it must be a whole number from 1")
        if average not in AVERAGES:
            raise ACKDError(f"average of a shared classifier is {average!r}; it must be one of {', '.join(AVERAGES)}")
        self.channels, self.num_classes, self.factor, self.average = channels, num_classes, factor, average
        self.projectors = nn.ModuleList(Projector(channels, shape[0], factor=factor) for shape in self.sizes)
        self.classifiers = nn.ModuleList(nn.Linear(shape[0], num_classes) for shape in self.sizes)

    def description(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        return {
            "channels": self.channels,
            "teachers": [list(shape) for shape in self.sizes],
            "num_classes": self.num_classes,
            "factor": self.factor,
            "average": self.average,
        }

    def project(self, feature: Tensor) -> list[Tensor]:
        """The student's feature map in the space of every teacher's.

        Args:
            feature: ``B x C x H x W``, the student's last map; pooled first where the teacher's is smaller.

        Returns:
            One ``B x C' x H' x W'`` a teacher, H' the smaller of the two heights.
        """
        projected = []
        for (_, height, width), projector in zip(self.sizes, self.projectors, strict=True):
            size = (min(feature.shape[2], height), min(feature.shape[3], width))
            shrunk = feature if tuple(feature.shape[2:]) == size else F.adaptive_avg_pool2d(feature, size)
            projected.append(projector(shrunk))
        return projected

    def classify(self, projected: Sequence[Tensor]) -> Tensor:
        """Mean prediction of the classifiers.

        Args:
            projected: as ``project`` gives it.

        Returns:
            ``B x K`` logits; of mean probabilities their logarithm, in float32.
        """
        logits: list[Tensor] = [net(pooled(each)) for net, each in zip(self.classifiers, projected, strict=True)]
        if len(logits) == 1:
            return logits[0]
        if self.average == "logits":
            return torch.stack(logits).mean(dim=0)
        each_log = torch.stack([F.log_softmax(each.float(), dim=1) for each in logits])
        return each_log.logsumexp(dim=0) - math.log(len(logits))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits ``B x K`` of the student's last feature map ``B x C x H x W``."""
        return self.classify(self.project(feature))


class HeadedNetwork(nn.Module):
    """A backbone with another head: its own classifier is taken out.

    It maps images to logits and can teach methods that read logits; its stages are not named for others.

    Args:
        backbone: whose stages are known; copied.
        head: reads its last feature map.

    Raises:
        ACKDError: when the stages of the backbone are not known.
    """

    def __init__(self, backbone: nn.Module, head: SharedClassifiers) -> None:
        super().__init__()
        plan = plan_for(backbone)
        if plan is None:
            raise ACKDError(
                f"another head needs to know the stages of {type(backbone).__name__}; give it an attribute "
                "`stage_plan` (a StagePlan), or choose a network of the zoo or a torchvision ResNet"
            )
        self.plan = plan
        self.backbone = copy.deepcopy(backbone)
        self.backbone.set_submodule(plan.classifier, nn.Identity())
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``B x K`` of images ``B x C x H x W``."""
        logits: Tensor = self.head(staged_forward(self.backbone, self.plan, image).features[-1])
        return logits


def with_head(backbone: nn.Module, description: Mapping[str, Any] | None) -> nn.Module:
    """The network that is kept: a backbone itself, or with a head of fresh weights in place of its classifier.

    Args:
        backbone: of fresh weights or trained ones.
        description: of the head; None for the backbone itself.
    """
    return backbone if description is None else HeadedNetwork(backbone, SharedClassifiers(**description))
