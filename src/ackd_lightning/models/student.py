"""The student: a target learner, and auxiliary learners that exist while it trains (ACKD, section 3.2)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.branches import (
    LAST,
    PEER,
    branch_names,
    default_branches,
    entry_stage,
    is_branch,
    resolved,
)
from ackd_lightning.models.copies import channels_by_name, clone, image_channels, name_of
from ackd_lightning.models.features import StagePlan, capture, staged_forward, watch
from ackd_lightning.models.finding import check_plan, plan_for, require_plan
from ackd_lightning.models.known import remembered
from ackd_lightning.models.outputs import logits_of
from ackd_lightning.models.suffix import Cuts
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import ImageSize, NetOutput


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
        cuts: Places at which the backbone can be cut; no weight is shared with it.
        entry: Number of the first stage that the learner owns, from 1.

    Raises:
        ACKDError: If the backbone cannot be cut there.
    """

    def __init__(self, cuts: Cuts, entry: int) -> None:
        super().__init__()
        plan = cuts.plan
        self.entry, self.ratio = entry, cuts.ratio
        self.suffix = cuts.suffix(plan.features[entry - 1])
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
        branches: Auxiliary learners on the peer's own first stages.
    """

    entry = 0

    def __init__(self, network: nn.Module, branches: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.network = network
        self.plan = plan_for(network)
        watch(network, self.plan)
        self.branches = nn.ModuleList(branches)

    def forward(self, image: Tensor) -> NetOutput:
        """Compute the peer's logits, last feature map and embedding.

        Args:
            image: Images, ``B x C x H x W``.

        Returns:
            Logits ``B x K``, the last feature map alone and the embedding ``B x D``; the last two are None if the
            stages of the peer are unknown. ``branches`` has the outputs of the peer's own auxiliary learners.
        """
        out = _run_all(self.network, self.plan, self.branches, image)
        last = None if out.features is None else out.features[-1:]
        return NetOutput(out.logits, last, out.embedding, out.branches)


def _run_all(network: nn.Module, plan: StagePlan | None, branches: nn.ModuleList, image: Tensor) -> NetOutput:
    """Run a network once and its auxiliary learners on its features."""
    if plan is None or not branches:
        target, inputs = staged_forward(network, plan, image), (image,)
    else:
        output, features, embedding, values = capture(network, plan, image, image.shape[2] / image.shape[3])
        target = NetOutput(logits_of(output, name_of(network)), features, embedding)
        inputs = (image, *(values[name] for name in plan.features))
    if not branches:
        return target
    learners = [cast("AuxiliaryLearner | Peer", branch) for branch in branches]
    outputs = tuple(learner(inputs[learner.entry]) for learner in learners)
    return NetOutput(target.logits, target.features, target.embedding, outputs)


class BranchyStudent(nn.Module):
    """Target learner with auxiliary learners that share its first stages (ACKD, section 3.2 and Table 7), or peers.

    Without auxiliary learners it is the backbone that also returns its stages, so that every method trains the same
    class.

    Args:
        backbone: Target learner. Any network; one in which no stages are found can have peers, but no branches.
        branches: Auxiliary learners, such as ``("D3B1", "D2B2")``. The same name twice makes two learners with
            different fresh weights. ``last`` is D{K}B1 of a backbone with K stages, ``peer`` a second network of the
            backbone's structure, and a name that ``create_model`` knows a peer of that architecture. ``last2`` is
            D{K-1}B2. A peer can have branches of its own, as in ``peer+D3B1``. None for the paper's two, an empty
            sequence for no auxiliary learners.
        num_classes: Number K of classes; peers that are given by name need it.
        input_size: Height and width of the images in pixels, for which each branch is shown to be a part of the
            backbone: with the backbone's weights it computes the backbone's logits. None to leave that out.

    Raises:
        ACKDError: If an auxiliary learner does not fit the backbone, no stages are found in it, or it cannot be cut.

    Examples:
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
        self.specs = tuple(resolved(spec, self.plan) for spec in branches)
        self.backbone = backbone
        watch(backbone, self.plan)
        self.branches = nn.ModuleList(self._learners(num_classes, input_size))

    def _learners(self, num_classes: int | None, input_size: ImageSize | None) -> Iterator[AuxiliaryLearner | Peer]:
        name, cuts = name_of(self.backbone), None
        for spec in self.specs:
            network_name, _, own = spec.partition("+")
            if network_name == PEER:
                network = clone(self.backbone)
                init_fresh(network)
                yield self._peer(network, own, num_classes, input_size)
            elif num_classes is None or is_branch(spec):
                plan = require_plan(self.backbone, name, f"branch {spec!r}")
                entry = entry_stage(spec, plan, name)
                cuts = Cuts(self.backbone, plan, input_size) if cuts is None else cuts
                yield self._branch(spec, cuts, entry, proved=input_size is not None)
            else:
                yield self._peer(self._other(network_name, num_classes), own, num_classes, input_size)

    @staticmethod
    def _peer(network: nn.Module, own: str, num_classes: int | None, input_size: ImageSize | None) -> Peer:
        """Build a peer with the branches that its name lists."""
        if not own:
            return Peer(network)
        return Peer(
            network, BranchyStudent(network, own.split("+"), num_classes=num_classes, input_size=input_size).branches
        )

    def _other(self, spec: str, num_classes: int) -> nn.Module:
        """Build a network of another architecture."""
        try:
            return create_model(spec, num_classes, **channels_by_name(image_channels(self.backbone)))
        except ACKDError as error:
            if self.plan is None:
                raise
            reason = str(error)
        known, name = ", ".join(branch_names(self.plan)), name_of(self.backbone)
        raise ACKDError(
            f"branch {spec!r} does not fit {name}, which has {len(self.plan.features) - 1} stages; use one of {known}, "
            f"or a network of its own ({reason})"
        )

    def _branch(self, spec: str, cuts: Cuts, entry: int, *, proved: bool) -> AuxiliaryLearner:
        """Build a branch, and show that its structure is the backbone's by running it with the backbone's weights."""
        features = cuts.plan.features
        try:
            find = functools.partial(cuts.difference, features[entry - 1])
            asked = ("difference", features, entry, cuts.example[1].shape, cuts.has_weights)
            reason = remembered(self.backbone, asked, find) if proved else None
            if reason is None:
                return AuxiliaryLearner(cuts, entry)
        except ACKDError as error:
            reason = str(error)
        works = [
            name
            for name, feature in zip(branch_names(cuts.plan), reversed(features[:-1]), strict=True)
            if feature != features[entry - 1] and cuts.difference(feature) is None
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
        return _run_all(self.backbone, self.plan, self.branches, image)

    @property
    def wrapped(self) -> nn.Module:
        """The backbone, after which messages name this student."""
        return self.backbone

    def plain(self) -> nn.Module:
        """Return the target learner alone: its state dict loads strictly into ``create_model(...)``."""
        return self.backbone
