"""The student: a target learner, and auxiliary learners that exist while it trains (ACKD, section 3.2)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.branches import LAST, PEER, branch_names, default_branches, entry_stage, is_branch
from ackd_lightning.models.features import (
    StagePlan,
    capture,
    check_plan,
    native_sizes,
    plan_for,
    require_plan,
    staged_forward,
    traced,
    watch,
)
from ackd_lightning.models.suffix import Suffix, difference
from ackd_lightning.models.tracing import logits_of, name_of
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import ImageSize, NetOutput, height_width


def init_fresh(module: nn.Module) -> None:
    """Give every layer of a module new random weights, in place.

    Convolutions get He-normal weights (fan-out) and zero biases, other layers torch's own initialisation. Parameters
    of layers without one, such as position embeddings, are drawn from a normal distribution with the mean and the
    standard deviation that they have; constant ones stay.

    Args:
        module: Module to initialise.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
        else:
            for parameter in layer.parameters(recurse=False):
                if parameter.is_floating_point() and parameter.numel() > 1 and not parameter.is_meta:
                    values = parameter.detach()
                    nn.init.normal_(parameter, float(values.mean()), float(values.std()))


class AuxiliaryLearner(nn.Module):
    """Branch of the student: the backbone's own structure from a stage to the logits, with fresh weights.

    Args:
        backbone: Network whose structure is copied; no weight is shared.
        plan: Stages of the backbone.
        entry: Number of the first stage that the learner owns, from 1.
        input_size: Height and width in pixels of the backbone's images.

    Raises:
        ACKDError: If the backbone cannot be cut there.
    """

    def __init__(self, backbone: nn.Module, plan: StagePlan, entry: int, input_size: ImageSize) -> None:
        super().__init__()
        height, width = height_width(input_size)
        self.entry, self.ratio = entry, height / width
        self.suffix = Suffix(backbone, plan.features[entry - 1], input_size)
        self.plan = StagePlan(plan.features[-1:], plan.classifier, plan.pooled)
        watch(self.suffix.network, self.plan)
        init_fresh(self)

    def forward(self, value: Any) -> NetOutput:
        """Compute the learner's logits and last feature map from the input of its entry stage.

        Args:
            value: F_{entry-1} of the backbone as its module returns it; the gradient flows back into the backbone.

        Returns:
            Logits z^(k) ``B x K``; one feature, h^(k) before pooling; embedding ``B x D``.
        """
        output, features, embedding, _ = capture(self.suffix.network, self.plan, value, self.ratio, run=self.suffix)
        return NetOutput(logits=logits_of(output), features=features, embedding=embedding)


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
        watch(network, self.plan)

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
        backbone: Target learner. Any network; one in which no stages are found can have peers, but no branches.
        branches: Auxiliary learners, such as ``("D3B1", "D2B2")``. The same name twice makes two learners with
            different fresh weights. ``last`` is D{K}B1 of a backbone with K stages, ``peer`` a second network of the
            backbone's structure, and a name that ``create_model`` knows a peer of that architecture. None for the
            paper's two, an empty sequence for no auxiliary learners.
        num_classes: Number K of classes; peers that are given by name need it.
        input_size: Height and width of the images in pixels, for which each branch is shown to be a part of the
            backbone: with the backbone's weights it computes the backbone's logits. None to leave that out.

    Raises:
        ACKDError: If an auxiliary learner does not fit the backbone, no stages are found in it, or it cannot be cut.

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
        self.plan = plan_for(backbone, input_size)
        if self.plan is not None and input_size is not None:
            check_plan(backbone, self.plan, input_size)
        if branches is None:
            branches = (LAST,) if self.plan is None else default_branches(self.plan)
        last = LAST if self.plan is None else branch_names(self.plan)[0]
        self.specs = tuple(last if spec == LAST else spec for spec in branches)
        self.backbone = backbone
        watch(backbone, self.plan)
        self.branches = nn.ModuleList(self._learner(spec, num_classes, input_size) for spec in self.specs)

    def _learner(self, spec: str, num_classes: int | None, input_size: ImageSize | None) -> AuxiliaryLearner | Peer:
        name = name_of(self.backbone)
        if spec == PEER:
            network = copy.deepcopy(self.backbone)
            init_fresh(network)
            return Peer(network)
        if num_classes is None or is_branch(spec):
            plan = require_plan(self.backbone, name, f"branch {spec!r}")
            return self._branch(spec, plan, entry_stage(spec, plan, name), input_size)
        try:
            return Peer(create_model(spec, num_classes))
        except ACKDError as error:
            if self.plan is None:
                raise
            reason = str(error)
        known = ", ".join(branch_names(self.plan))
        raise ACKDError(
            f"branch {spec!r} does not fit {name}, which has {len(self.plan.features) - 1} stages; use one of {known}, "
            f"or a network of its own ({reason})"
        )

    def _branch(self, spec: str, plan: StagePlan, entry: int, input_size: ImageSize | None) -> AuxiliaryLearner:
        """Build a branch, and show that its structure is the backbone's by running it with the backbone's weights."""
        size = input_size
        if size is None:
            size = next((each for each in native_sizes(self.backbone) if traced(self.backbone, each) is not None), 32)
        reason = None
        try:
            if input_size is not None:
                reason = difference(self.backbone, plan, plan.features[entry - 1], size)
            if reason is None:
                return AuxiliaryLearner(self.backbone, plan, entry, size)
        except ACKDError as error:
            reason = str(error)
        names = branch_names(plan)
        works = [
            each
            for number, each in zip(range(len(names), 0, -1), names, strict=True)
            if number != entry and difference(self.backbone, plan, plan.features[number - 1], size) is None
        ]
        remedy = f"use one of {', '.join(works)}" if works else "use peers, or another network"
        raise ACKDError(f"branch {spec!r} cannot be cut out of {name_of(self.backbone)} ({reason}); {remedy}")

    def forward(self, image: Tensor) -> NetOutput:
        """Run the backbone once and every auxiliary learner on its features.

        Args:
            image: Images, ``B x C x H x W``.

        Returns:
            Output of the target learner, whose ``branches`` hold one output per auxiliary learner.
        """
        if self.plan is None or not self.branches:
            target, inputs = staged_forward(self.backbone, self.plan, image), (image,)
        else:
            output, features, embedding, values = capture(
                self.backbone, self.plan, image, image.shape[2] / image.shape[3]
            )
            target = NetOutput(logits_of(output, name_of(self.backbone)), features, embedding)
            inputs = (image, *(values[name] for name in self.plan.features))
        if not self.branches:
            return target
        learners = [cast("AuxiliaryLearner | Peer", branch) for branch in self.branches]
        outputs = tuple(learner(inputs[learner.entry]) for learner in learners)
        return NetOutput(target.logits, target.features, target.embedding, outputs)

    def plain(self) -> nn.Module:
        """Return the target learner alone: its state dict loads strictly into ``create_model(...)``."""
        return self.backbone
