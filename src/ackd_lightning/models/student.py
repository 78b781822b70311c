"""The student: a target learner, and auxiliary learners that grow out of it while it trains (ACKD, section 3.2)."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import StagePlan, plan_for, pooled, staged_forward
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import NetOutput


def init_fresh(module: nn.Module) -> None:
    """Give every layer of a module new random weights: He-normal (fan-out) convolutions, torch's own for the rest.

    Args:
        module: changed in place.

    Raises:
        ACKDError: for a layer with parameters of its own that has no ``reset_parameters``.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
        elif any(True for _ in layer.parameters(recurse=False)):
            raise ACKDError(
                f"cannot give {type(layer).__name__} fresh weights for an auxiliary learner; "
                "add a method `reset_parameters` to that layer"
            )


def default_branches(plan: StagePlan) -> tuple[str, ...]:
    """The paper's two auxiliary learners (Table 7): ``D{K}B1`` and ``D{K-1}B2`` for a backbone of K stages.

    Args:
        plan: of the backbone.
    """
    count = len(plan.stages)
    return tuple(f"D{entry}B{count + 1 - entry}" for entry in (count, count - 1) if entry >= 1)


def _specs(plan: StagePlan) -> list[str]:
    """Every ``DnBm`` that fits."""
    count = len(plan.stages)
    return [f"D{entry}B{count + 1 - entry}" for entry in range(count, 0, -1)]


def entry_stage(spec: str, plan: StagePlan, backbone: str = "the backbone") -> int:
    """Read ``DnBm`` (Table 7): the learner reads the input of stage n and owns the m stages from there to the end.

    Args:
        spec: such as ``"D3B1"``.
        plan: of the backbone.
        backbone: its name, for the message.

    Returns:
        n, counted from 1.

    Raises:
        ACKDError: when the text is no such spec or does not fit the backbone.
    """
    count = len(plan.stages)
    match = re.fullmatch(r"D(\d+)B(\d+)", spec)
    if match is None or int(match[1]) < 1 or int(match[1]) + int(match[2]) != count + 1 or int(match[2]) < 1:
        valid = ", ".join(_specs(plan))
        raise ACKDError(f"branch {spec!r} does not fit {backbone}, which has {count} stages; use one of {valid}")
    return int(match[1])


class AuxiliaryLearner(nn.Module):
    """A branch: its own copy of the backbone's last stages with fresh weights, pooling and classifier.

    Args:
        backbone: gives the structure; its weights are not shared.
        plan: of the backbone.
        entry: number of the first stage that the learner owns, from 1.
    """

    def __init__(self, backbone: nn.Module, plan: StagePlan, entry: int) -> None:
        super().__init__()
        self.entry = entry
        owned = [*plan.stages[entry - 1 :], plan.tail]
        self.stages = nn.ModuleList(
            nn.Sequential(*(copy.deepcopy(backbone.get_submodule(name)) for name in names)) for names in owned if names
        )
        self.classifier = copy.deepcopy(backbone.get_submodule(plan.classifier))
        init_fresh(self)

    def forward(self, feature: Tensor) -> NetOutput:
        """Turn the input of the entry stage into the learner's logits and feature map.

        Args:
            feature: ``B x C x H x W``, F_{entry-1} of the trunk; the gradient flows back into the trunk.

        Returns:
            Logits z^(k) ``B x K``; one feature, h^(k) before pooling; embedding ``B x D``.
        """
        for stage in self.stages:
            feature = stage(feature)
        embedding = pooled(feature)
        return NetOutput(logits=self.classifier(embedding), features=(feature,), embedding=embedding)


class Peer(nn.Module):
    """A learner that shares nothing with the target learner: a whole network of its own.

    Args:
        network: any network that maps images to logits.
    """

    entry = 0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.plan = plan_for(network)

    def forward(self, image: Tensor) -> NetOutput:
        """The peer's own look at the images.

        Args:
            image: ``B x C x H x W``.

        Returns:
            Logits ``B x K``; its last feature map, where its stages are known; embedding ``B x D``.
        """
        out = staged_forward(self.network, self.plan, image)
        return NetOutput(logits=out.logits, features=out.features[-1:], embedding=out.embedding)


class BranchyStudent(nn.Module):
    """Target learner with auxiliary learners on shared low stages (ACKD, section 3.2 and Table 7), or with peers.

    Without branches it is just the backbone that hands out its stages, so every method trains the same class.

    Args:
        backbone: the target learner: a network of the zoo, a torchvision ResNet, or any with a ``stage_plan``.
        branches: such as ``("D3B1", "D2B2")``; the same entry twice gives two independently initialised learners, and
            ``last`` stands for D{K}B1 of a backbone of K stages. ``peer`` is a second network of the backbone's
            structure with fresh weights, and any name that ``create_model`` knows is a peer of that architecture.
            None: the paper's two. Empty: no learners.
        num_classes: K, for peers given by name.

    Raises:
        ACKDError: when a spec does not fit the backbone, or the backbone's stages are not known.

    Example:
        >>> from ackd_lightning.models.zoo import create_model
        >>> import torch
        >>> student = BranchyStudent(create_model("resnet8", 10), ["D3B1", "D2B2"])
        >>> out = student(torch.zeros(2, 3, 32, 32))
        >>> [tuple(branch.logits.shape) for branch in out.branches]
        [(2, 10), (2, 10)]
    """

    def __init__(
        self, backbone: nn.Module, branches: Sequence[str] | None = None, *, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.plan = plan_for(backbone)
        if branches is None:
            branches = default_branches(self.plan) if self.plan is not None else ("last",)
        last = f"D{len(self.plan.stages)}B1" if self.plan is not None else "last"
        self.specs = tuple(last if spec == "last" else spec for spec in branches)
        self.backbone = backbone
        self.branches = nn.ModuleList(self._learner(spec, num_classes) for spec in self.specs)

    def _learner(self, spec: str, num_classes: int | None) -> AuxiliaryLearner | Peer:
        name = type(self.backbone).__name__
        if spec == "peer":
            network = copy.deepcopy(self.backbone)
            init_fresh(network)
            return Peer(network)
        if num_classes is not None and re.match(r"D\d|last$", spec) is None:
            try:
                return Peer(create_model(spec, num_classes))
            except ACKDError as error:
                if self.plan is None:
                    raise
                reason = str(error)
            known = ", ".join(_specs(self.plan))
            raise ACKDError(
                f"branch {spec!r} does not fit {name}, which has {len(self.plan.stages)} stages; use one of {known}, "
                f"or a network of its own ({reason})"
            )
        if self.plan is None:
            raise ACKDError(
                f"auxiliary learners need to know the stages of {name}; give it an attribute `stage_plan` "
                "(a StagePlan), or choose a network of the zoo or a torchvision ResNet"
            )
        return AuxiliaryLearner(self.backbone, self.plan, entry_stage(spec, self.plan, name))

    def forward(self, image: Tensor) -> NetOutput:
        """One pass of the trunk, the target's head and every auxiliary learner.

        Args:
            image: ``B x C x H x W``.

        Returns:
            The target learner's output, with one output per auxiliary learner in ``branches``.
        """
        target = staged_forward(self.backbone, self.plan, image)
        if not self.branches:
            return target
        learners = [cast("AuxiliaryLearner | Peer", branch) for branch in self.branches]
        inputs = (image, *target.features)
        outputs = tuple(learner(inputs[learner.entry]) for learner in learners)
        return NetOutput(target.logits, target.features, target.embedding, outputs)

    def plain(self) -> nn.Module:
        """The target learner alone, untouched: its state dict loads strictly into ``create_model(...)``."""
        return self.backbone
