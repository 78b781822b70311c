"""The student: a target learner, and auxiliary learners that exist while it trains (ACKD, section 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.branches import LAST, PEER, branch_names, default_branches, entry_stage, is_branch
from ackd_lightning.models.features import (
    StagePlan,
    check_plan,
    image_channels,
    plan_for,
    pooled,
    require_plan,
    staged_forward,
)
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import ImageSize, NetOutput


def init_fresh(module: nn.Module) -> None:
    """Give every layer of a module new random weights, in place.

    Convolutions get He-normal weights (fan-out) and zero biases, all other layers torch's own initialisation.

    Args:
        module: Module to initialise.

    Raises:
        ACKDError: If a layer has parameters of its own and no ``reset_parameters``.
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
                f"{type(layer).__name__} cannot get fresh weights for an auxiliary learner; add a method "
                "`reset_parameters` to that layer"
            )


class AuxiliaryLearner(nn.Module):
    """Branch of the student: a copy of the backbone's last stages with fresh weights, pooling and a classifier.

    Args:
        backbone: Network whose structure is copied; no weight is shared.
        plan: Stages of the backbone.
        entry: Number of the first stage that the learner owns, from 1.
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
        """Compute the learner's logits and feature map from the input of its entry stage.

        Args:
            feature: F_{entry-1} of the backbone, ``B x C x H x W``; the gradient flows back into the backbone.

        Returns:
            Logits z^(k) ``B x K``; one feature, h^(k) before pooling; embedding ``B x D``.
        """
        for stage in self.stages:
            feature = stage(feature)
        embedding = pooled(feature)
        return NetOutput(logits=self.classifier(embedding), features=(feature,), embedding=embedding)


class Peer(nn.Module):
    """Auxiliary learner that is a whole network of its own and shares nothing with the target learner.

    Args:
        network: Network with fresh weights.
    """

    entry = 0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.plan = plan_for(network)

    def forward(self, image: Tensor) -> NetOutput:
        """Compute the peer's logits, last feature map and embedding.

        Args:
            image: Images, ``B x C x H x W``.

        Returns:
            Logits ``B x K``, the last feature map alone and the embedding ``B x D``; the last two are None if the
            stages of the peer are unknown.
        """
        out = staged_forward(self.network, self.plan, image)
        last = None if out.features is None else out.features[-1:]
        return NetOutput(logits=out.logits, features=last, embedding=out.embedding)


class BranchyStudent(nn.Module):
    """Target learner with auxiliary learners that share its first stages (ACKD, section 3.2 and Table 7), or peers.

    Without auxiliary learners it is the backbone that also returns its stages, so that every method trains the same
    class.

    Args:
        backbone: Target learner. Any network; one without known stages can have peers, but no branches.
        branches: Auxiliary learners, such as ``("D3B1", "D2B2")``. The same name twice makes two learners with
            different fresh weights. ``last`` is D{K}B1 of a backbone with K stages, ``peer`` a second network of the
            backbone's structure, and a name that ``create_model`` knows a peer of that architecture. None for the
            paper's two, an empty sequence for no auxiliary learners.
        num_classes: Number K of classes; peers that are given by name need it.
        input_size: Height and width of the images in pixels, with which the stage plans of backbone and peers are
            compared with their own forward passes. None to leave that out.

    Raises:
        ACKDError: If an auxiliary learner does not fit the backbone, the backbone's stages are not known, or a stage
            plan is wrong.

    Example:
        >>> from ackd_lightning.models.zoo import create_model
        >>> import torch
        >>> student = BranchyStudent(create_model("resnet8", 10), ["D3B1", "D2B2"])
        >>> out = student(torch.zeros(2, 3, 32, 32))
        >>> [tuple(branch.logits.shape) for branch in out.branches]
        [(2, 10), (2, 10)]
    """

    def __init__(
        self,
        backbone: nn.Module,
        branches: Sequence[str] | None = None,
        *,
        num_classes: int | None = None,
        input_size: ImageSize | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan_for(backbone)
        if self.plan is not None and input_size is not None:
            check_plan(backbone, self.plan, input_size, image_channels(backbone))
        if branches is None:
            branches = (LAST,) if self.plan is None else default_branches(self.plan)
        last = LAST if self.plan is None else branch_names(self.plan)[0]
        self.specs = tuple(last if spec == LAST else spec for spec in branches)
        self.backbone = backbone
        self.branches = nn.ModuleList(self._learner(spec, num_classes, input_size) for spec in self.specs)

    def _learner(self, spec: str, num_classes: int | None, input_size: ImageSize | None) -> AuxiliaryLearner | Peer:
        name = type(self.backbone).__name__
        if spec == PEER:
            network = copy.deepcopy(self.backbone)
            init_fresh(network)
            return Peer(network)
        if num_classes is None or is_branch(spec):
            plan = require_plan(self.backbone, name, f"branch {spec!r}")
            return AuxiliaryLearner(self.backbone, plan, entry_stage(spec, plan, name))
        try:
            peer = Peer(create_model(spec, num_classes))
        except ACKDError as error:
            if self.plan is None:
                raise
            reason = str(error)
        else:
            if peer.plan is not None and input_size is not None:
                check_plan(peer.network, peer.plan, input_size, image_channels(peer.network))
            return peer
        known = ", ".join(branch_names(self.plan))
        raise ACKDError(
            f"branch {spec!r} does not fit {name}, which has {len(self.plan.stages)} stages; use one of {known}, "
            f"or a network of its own ({reason})"
        )

    def forward(self, image: Tensor) -> NetOutput:
        """Run the backbone once and every auxiliary learner on its features.

        Args:
            image: Images, ``B x C x H x W``.

        Returns:
            Output of the target learner, whose ``branches`` hold one output per auxiliary learner.
        """
        target = staged_forward(self.backbone, self.plan, image)
        if not self.branches:
            return target
        learners = [cast("AuxiliaryLearner | Peer", branch) for branch in self.branches]
        inputs = (image, *(target.features or ()))
        outputs = tuple(learner(inputs[learner.entry]) for learner in learners)
        return NetOutput(target.logits, target.features, target.embedding, outputs)

    def plain(self) -> nn.Module:
        """Return the target learner alone: its state dict loads strictly into ``create_model(...)``."""
        return self.backbone
