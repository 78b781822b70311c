"""Classifiers of teachers, and heads with them that replace the student's own classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import mean_log_probability, shrunk
from ackd_lightning.models.copies import clone, name_of
from ackd_lightning.models.features import StagePlan, capture, pooled
from ackd_lightning.models.finding import require_plan, traced
from ackd_lightning.models.known import remembered
from ackd_lightning.models.outputs import logits_of
from ackd_lightning.validation import PositiveInt, checked

Average = Literal["logits", "probabilities"]


class Projector(nn.Sequential):
    """Three convolutions (1x1, 3x3, 1x1) from the student's channels to the teacher's, each with BatchNorm and ReLU.

    Chen et al.: Knowledge Distillation with the Reused Teacher Classifier, 2022, section 3.2.

    Args:
        channels: Channels of the student's feature map.
        out_channels: Channels of the teacher's feature map.
        factor: Ratio of ``out_channels`` to the channels of the two inner maps.
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
    """Head that predicts with the classifiers of one or several teachers, each after a projector of its own.

    Args:
        channels: Channels C of the student's last feature map.
        teachers: Shape ``(C, H, W)`` of the last feature map of each teacher.
        num_classes: Number K of classes.
        factor: Ratio by which the inner maps of the projectors are narrower than the teacher's.
        average: Quantity that is averaged over several teachers.

    Raises:
        ACKDError: If a size is not a whole number above 0, there are no teachers, or the average is unknown.
    """

    @checked
    def __init__(
        self,
        channels: PositiveInt,
        teachers: Sequence[Sequence[PositiveInt]],
        num_classes: PositiveInt,
        *,
        factor: PositiveInt = 2,
        average: Average = "logits",
    ) -> None:
        super().__init__()
        self.sizes = tuple(tuple(shape) for shape in teachers)
        if not self.sizes or any(len(shape) != 3 for shape in self.sizes):
            raise ACKDError(
                f"teachers is {list(teachers)} in SharedClassifiers; give channels, height and width of each teacher"
            )
        self.channels, self.num_classes, self.factor, self.average = channels, num_classes, factor, average
        self.projectors = nn.ModuleList(Projector(channels, shape[0], factor=factor) for shape in self.sizes)
        self.classifiers = nn.ModuleList(nn.Linear(shape[0], num_classes) for shape in self.sizes)

    def description(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data."""
        return {
            "channels": self.channels,
            "teachers": [list(shape) for shape in self.sizes],
            "num_classes": self.num_classes,
            "factor": self.factor,
            "average": self.average,
        }

    def project(self, feature: Tensor) -> list[Tensor]:
        """Map the student's feature map to the space of each teacher.

        Args:
            feature: Last feature map of the student, ``B x C x H x W``; pooled first to the teacher's height and
                width where those are smaller.

        Returns:
            One ``B x C' x H' x W'`` per teacher, H' the smaller of the two heights and W' of the two widths.
        """
        pairs = zip(self.sizes, self.projectors, strict=True)
        return [projector(shrunk(feature, height, width)) for (_, height, width), projector in pairs]

    def classify(self, projected: Sequence[Tensor]) -> Tensor:
        """Average the predictions of the classifiers.

        Args:
            projected: Maps that ``project`` returns.

        Returns:
            Logits ``B x K``; for ``average="probabilities"`` the logarithm of the mean probabilities, in float32.
        """
        logits: list[Tensor] = [net(pooled(each)) for net, each in zip(self.classifiers, projected, strict=True)]
        if len(logits) == 1:
            return logits[0]
        if self.average == "logits":
            return torch.stack(logits).mean(dim=0)
        return mean_log_probability(logits)

    def forward(self, feature: Tensor) -> Tensor:
        """Compute logits ``B x K`` from the student's last feature map ``B x C x H x W``."""
        return self.classify(self.project(feature))


def after_last_map(network: nn.Module, plan: StagePlan) -> tuple[str, ...]:
    """Name the modules that another head makes useless: the classifier, and layers between it and the last map.

    Layers in between are those that a network runs after global pooling, as MobileNetV3 and VGG do. Where the network
    cannot run without them, the classifier alone is named.

    Args:
        network: Network that the plan describes.
        plan: Stages of the network.
    """
    asked = ("after the last map", plan.features[-1], plan.classifier)
    return remembered(network, asked, lambda: _after_last_map(network, plan))


def _after_last_map(network: nn.Module, plan: StagePlan) -> tuple[str, ...]:
    own = () if plan.classifier is None else (plan.classifier,)
    example = traced(network)
    last = None if example is None else example[2].calls.get(plan.features[-1])
    if example is None or last is None:
        return own
    copied, image, record = example
    later = [name for name, call in record.calls.items() if call.start > last.end]
    outermost = [name for name in later if not any(name.startswith(f"{each}.") for each in later)]
    named = tuple(name for name in outermost if next(copied.get_submodule(name).parameters(), None) is not None)
    try:
        with torch.no_grad():
            _without(copied, named)(image)
    except Exception:  # anything may happen in a network without its last layers
        return own
    return named


def _without(network: nn.Module, names: Sequence[str]) -> nn.Module:
    for name in names:
        network.set_submodule(name, nn.Identity())
    return network


class HeadedNetwork(nn.Module):
    """Backbone up to its last map, with another head in place of its own classifier and the layers before it.

    It maps images to logits and can teach methods that read logits; it does not offer its stages.

    Args:
        backbone: Network whose stages are known; it is copied.
        head: Head that reads the last feature map.
        reads: Module of the backbone that returns this map; None for that of its last stage.

    Raises:
        ACKDError: If the stages of the backbone are not known, or it has no such module.
    """

    def __init__(self, backbone: nn.Module, head: SharedClassifiers, reads: str | None = None) -> None:
        super().__init__()
        plan = require_plan(backbone, type(backbone).__name__, "another head")
        if reads is not None:
            if reads not in dict(backbone.named_modules()):
                raise ACKDError(
                    f"a head reads the module {reads!r}, which {name_of(backbone)} has not; choose another file"
                )
            plan = replace(plan, features=(reads,))
        self.plan = StagePlan(plan.features, pooled=plan.pooled)
        self.backbone = _without(clone(backbone), after_last_map(backbone, plan))
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits ``B x K`` of images ``B x C x H x W``."""
        _, features, _, _ = capture(self.backbone, self.plan, image, image.shape[2] / image.shape[3])
        logits: Tensor = self.head(features[-1])
        return logits


class LogitsAlone(nn.Module):
    """Network that returns logits ``B x K`` and nothing else, whatever form those of the network inside have.

    Args:
        network: Network whose output `logits_of` can read; it is not copied.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @property
    def wrapped(self) -> nn.Module:
        """The network inside, after which messages name this one."""
        return self.network

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits ``B x K`` of images ``B x C x H x W``."""
        return logits_of(self.network(image), name_of(self))


def with_head(backbone: nn.Module, description: Mapping[str, Any] | None) -> nn.Module:
    """Return the network that is kept: the backbone itself, or the backbone with a head of fresh weights.

    Args:
        backbone: Network with fresh or trained weights.
        description: Description of the head, as ``SharedClassifiers.description`` returns it, with the name of the
            module that it ``reads``; None for no other head.
    """
    if description is None:
        return backbone
    arguments = dict(description)
    reads = arguments.pop("reads", None)
    return HeadedNetwork(backbone, SharedClassifiers(**arguments), reads)


def shared_classifier(network: nn.Module, method: str, *, fixed: bool = False) -> nn.Linear:
    """Return the classifier of a teacher that a student can share.

    Args:
        network: Network of a teacher.
        method: Name of the method that shares it, for the message.
        fixed: Whether the classifier is only read. A 1 x 1 convolution that reads the pooled map, as some networks of
            timm have, is then returned as a linear layer that shares its weights.

    Raises:
        ACKDError: If the classifier is unknown, or is not a linear layer with a bias.
    """
    teacher = f"the teacher {type(network).__name__}"
    plan = require_plan(network, teacher, f"method {method}")
    if plan.classifier is None:
        raise ACKDError(
            f"no classifier is known in {teacher}, and method {method} shares a linear layer with a bias; choose "
            "a teacher that calls its classifier as a module"
        )
    found = network.get_submodule(plan.classifier)
    while isinstance(found, nn.Sequential) and len(found) == 1:
        found = found[0]
    if fixed and isinstance(found, nn.Conv2d) and found.bias is not None and _reads_pooled(network, found):
        linear = nn.Linear(found.in_channels, found.out_channels, device="meta")
        linear.weight = nn.Parameter(found.weight.detach().flatten(1), requires_grad=False)
        linear.bias = nn.Parameter(found.bias.detach(), requires_grad=False)
        return linear
    if not isinstance(found, nn.Linear) or found.bias is None:
        shown = f"a {type(found).__name__}" if any(True for _ in found.children()) else found
        raise ACKDError(
            f"the classifier of {teacher} is {shown}, and method {method} shares a linear layer with a bias; choose "
            "another teacher"
        )
    return found


def _reads_pooled(network: nn.Module, layer: nn.Conv2d) -> bool:
    """Whether a convolution is the last layer of a network and reads one position."""
    example = traced(network)
    name = next(name for name, module in network.named_modules() if module is layer)
    if example is None or layer.kernel_size != (1, 1) or layer.groups != 1:
        return False
    copied, image, _ = example
    seen: list[tuple[Tensor, Tensor]] = []
    handle = copied.get_submodule(name).register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    try:
        logits = logits_of(copied(image))
    finally:
        handle.remove()
    ((given, out),) = seen
    return given.shape[2:] == (1, 1) and out.numel() == logits.numel()
