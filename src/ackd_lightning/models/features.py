"""Where a network's stages are, and a forward pass that hands out what flows between them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.types import NetOutput, NetSpec


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Names of a network's modules, in the order in which they are called.

    Calling the stem's modules, then each stage's, then the tail's, then global average pooling, flattening and the
    classifier equals the network's own ``forward``. A network of your own takes part in everything that needs stages
    as soon as it has such a plan in its attribute ``stage_plan``.

    Attributes:
        stem: modules before the first stage; their output is F_0.
        stages: modules of each stage S_1 .. S_K; the output of stage n is F_n.
        tail: modules between the last stage and the pooling (a final BatchNorm and ReLU, say).
            A branch owns its own copy.
        classifier: the module that turns the pooled embedding into logits.
    """

    stem: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    tail: tuple[str, ...]
    classifier: str


def plan_for(network: nn.Module) -> StagePlan | None:
    """Return where the stages of a network are, or None when that is not known.

    Known are the networks of our zoo and any other with an attribute ``stage_plan``, and torchvision's ResNets.

    Args:
        network: any network.
    """
    plan = getattr(network, "stage_plan", None)
    if isinstance(plan, StagePlan):
        return plan
    from torchvision.models import ResNet  # heavy, and only needed here

    if isinstance(network, ResNet):
        stages = tuple((f"layer{number}",) for number in range(1, 5))
        return StagePlan(stem=("conv1", "bn1", "relu", "maxpool"), stages=stages, tail=(), classifier="fc")
    return None


def call_in_order(network: nn.Module, names: tuple[str, ...], feature: Tensor) -> Tensor:
    """Apply named modules of a network one after the other.

    Args:
        network: owns the modules.
        names: dotted module names.
        feature: ``B x C x H x W``, input of the first.

    Returns:
        Output of the last.
    """
    for name in names:
        feature = network.get_submodule(name)(feature)
    return feature


def pooled(feature: Tensor) -> Tensor:
    """Global average pooling.

    Args:
        feature: ``B x C x H x W``.

    Returns:
        ``B x C``.
    """
    return F.adaptive_avg_pool2d(feature, 1).flatten(1)


def staged_forward(network: nn.Module, plan: StagePlan | None, image: Tensor) -> NetOutput:
    """Run a network and hand out logits, stage outputs and the pooled embedding.

    Args:
        network: any network that maps images to logits.
        plan: where its stages are. Without a plan the output has no features and an embedding of width 0.
        image: ``B x C x H x W``.

    Returns:
        Logits ``B x K`` equal to ``network(image)``, features F_0 .. F_S, embedding ``B x D``.
    """
    if plan is None:
        logits = cast(Tensor, network(image))
        return NetOutput(logits=logits, features=(), embedding=logits.new_empty(logits.shape[0], 0))
    feature = call_in_order(network, plan.stem, image)
    features = [feature]
    for stage in plan.stages:
        feature = call_in_order(network, stage, feature)
        features.append(feature)
    features[-1] = feature = call_in_order(network, plan.tail, feature)
    embedding = pooled(feature)
    logits = network.get_submodule(plan.classifier)(embedding)
    return NetOutput(logits=logits, features=tuple(features), embedding=embedding)


def _spec(output: NetOutput) -> NetSpec:
    return NetSpec(
        num_classes=output.logits.shape[1],
        features=tuple(cast("tuple[int, int, int]", tuple(feature.shape[1:])) for feature in output.features),
        embedding=output.embedding.shape[1],
        branches=tuple(_spec(branch) for branch in output.branches),
    )


def probe(network: nn.Module, input_size: int, *, in_channels: int = 3) -> NetSpec:
    """Shapes of everything a network hands out for one image, found on the meta device: nothing is computed.

    Args:
        network: a network, or one whose forward returns a ``NetOutput``.
        input_size: height and width of the image in pixels.
        in_channels: channels of the image.

    Raises:
        ValueError: for a network that is shared with its copies, as a ``FrozenTeacher`` is: probe its ``network``.
    """
    ghost = copy.deepcopy(network)
    if ghost is network:
        raise ValueError(f"{type(network).__name__} is shared with its copies and cannot be probed; probe its network")
    ghost = ghost.to("meta").eval()
    image = torch.empty(1, in_channels, input_size, input_size, device="meta")
    output = ghost(image)
    if not isinstance(output, NetOutput):
        output = staged_forward(ghost, plan_for(ghost), image)
    return _spec(output)
