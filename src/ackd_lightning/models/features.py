"""Stages of a network: where they are, what flows between them, and whether that description is right."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.random import seed_device
from ackd_lightning.types import ImageSize, NetOutput, NetSpec, height_width

_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit, that is put down to rounding (float32)."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Names of a network's modules in the order in which they are called.

    Calling the modules of the stem, of each stage and of the tail, then global average pooling, flattening and the
    classifier equals the network's own ``forward``. A network of your own supports everything that needs stages as
    soon as it has such a plan in an attribute ``stage_plan``; `check_plan` compares the two.

    Attributes:
        stem: Modules before the first stage; their output is F_0.
        stages: Modules of each stage S_1 .. S_K; the output of stage n is F_n.
        tail: Modules between the last stage and the pooling, such as a final BatchNorm and ReLU. Every auxiliary
            learner has its own copy.
        classifier: Module that maps the pooled embedding to logits.
    """

    stem: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    tail: tuple[str, ...]
    classifier: str


def plan_for(network: nn.Module) -> StagePlan | None:
    """Return the stage plan of a network, or None when its stages are unknown.

    Stages are known for networks with an attribute ``stage_plan``, which all networks of the zoo have, and for
    torchvision's ResNets.

    Args:
        network: Any network.
    """
    plan = getattr(network, "stage_plan", None)
    if isinstance(plan, StagePlan):
        return plan
    from torchvision.models import ResNet  # slow to import, and needed only here

    if isinstance(network, ResNet):
        stages = tuple((f"layer{number}",) for number in range(1, 5))
        return StagePlan(stem=("conv1", "bn1", "relu", "maxpool"), stages=stages, tail=(), classifier="fc")
    return None


def _unknown_stages(whose: str, needed_by: str) -> ACKDError:
    return ACKDError(
        f"the stages of {whose} are not known, and {needed_by} needs them; give the network an attribute `stage_plan` "
        "(a StagePlan), or choose a network whose stages are known, such as one of the zoo or a torchvision ResNet"
    )


def require_plan(network: nn.Module, whose: str, needed_by: str) -> StagePlan:
    """Return the stage plan of a network whose stages must be known.

    Args:
        network: Any network.
        whose: Name of the network in the error message, such as ``the teacher``.
        needed_by: What needs the stages, such as ``method ATSC``.

    Raises:
        ACKDError: If the stages are unknown.
    """
    plan = plan_for(network)
    if plan is None:
        raise _unknown_stages(whose, needed_by)
    return plan


@overload
def require_stages(given: NetSpec, whose: str, needed_by: str) -> tuple[tuple[int, int, int], ...]: ...
@overload
def require_stages(given: NetOutput, whose: str, needed_by: str) -> tuple[Tensor, ...]: ...
def require_stages(
    given: NetSpec | NetOutput, whose: str, needed_by: str
) -> tuple[tuple[int, int, int], ...] | tuple[Tensor, ...]:
    """Return the features of a network whose stages must be known.

    Args:
        given: Shapes or output of the network.
        whose: Name of the network in the error message, such as ``the teacher``.
        needed_by: What needs the stages, such as ``method AT``.

    Returns:
        Entries of ``features``: ``(C, H, W)`` each for a `NetSpec`, ``B x C x H x W`` each for a `NetOutput`.

    Raises:
        ACKDError: If the stages are unknown.

    Example:
        >>> require_stages(NetSpec(10, features=((16, 32, 32), (64, 8, 8)), embedding=64), "the teacher", "method AT")
        ((16, 32, 32), (64, 8, 8))
    """
    if given.features is None:
        raise _unknown_stages(whose, needed_by)
    return given.features


@overload
def require_embedding(given: NetSpec, whose: str, needed_by: str) -> int: ...
@overload
def require_embedding(given: NetOutput, whose: str, needed_by: str) -> Tensor: ...
def require_embedding(given: NetSpec | NetOutput, whose: str, needed_by: str) -> int | Tensor:
    """Return the embedding of a network whose stages must be known.

    Args:
        given: Shapes or output of the network.
        whose: Name of the network in the error message, such as ``the teacher``.
        needed_by: What needs the embedding, such as ``method CRD``.

    Returns:
        Width D for a `NetSpec`, tensor ``B x D`` for a `NetOutput`.

    Raises:
        ACKDError: If the stages are unknown.
    """
    if given.embedding is None:
        raise _unknown_stages(whose, needed_by)
    return given.embedding


def call_in_order(network: nn.Module, names: tuple[str, ...], feature: Tensor) -> Tensor:
    """Apply named modules of a network one after the other.

    Args:
        network: Owner of the modules.
        names: Dotted module names.
        feature: Input of the first module, ``B x C x H x W``.

    Returns:
        Output of the last module; ``feature`` itself when there are no names.
    """
    for name in names:
        feature = network.get_submodule(name)(feature)
    return feature


def pooled(feature: Tensor) -> Tensor:
    """Average a feature map over its positions.

    Args:
        feature: Feature map, ``B x C x H x W``.

    Returns:
        ``B x C``.
    """
    return F.adaptive_avg_pool2d(feature, 1).flatten(1)


def staged_forward(network: nn.Module, plan: StagePlan | None, image: Tensor) -> NetOutput:
    """Run a network and return logits, stage outputs and the pooled embedding.

    Args:
        network: Any network that maps images to logits.
        plan: Stages of the network. Without a plan the output has neither features nor an embedding.
        image: Images, ``B x C x H x W``.

    Returns:
        Logits ``B x K`` equal to ``network(image)``, features F_0 .. F_S, embedding ``B x D``.
    """
    if plan is None:
        return NetOutput(logits=cast(Tensor, network(image)))
    feature = call_in_order(network, plan.stem, image)
    features = [feature]
    for stage in plan.stages:
        feature = call_in_order(network, stage, feature)
        features.append(feature)
    features[-1] = feature = call_in_order(network, plan.tail, feature)
    embedding = pooled(feature)
    logits = network.get_submodule(plan.classifier)(embedding)
    return NetOutput(logits=logits, features=tuple(features), embedding=embedding)


def image_channels(network: nn.Module) -> int:
    """Number of channels of the images that a network reads: those of its first convolution, 3 without one.

    Args:
        network: Any network.
    """
    return next((each.in_channels for each in network.modules() if isinstance(each, nn.Conv2d)), 3)


def _twin(network: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a network in evaluation mode, without the hooks of its users."""
    twin = copy.deepcopy(network, memo)
    if twin is network:
        raise ValueError(f"{type(network).__name__} is shared with its copies and cannot be probed; probe its network")
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):  # spectral_norm makes weights in a hook
                    del hooks[key]
    return twin.eval()


def _dtype(network: nn.Module) -> torch.dtype:
    return next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.get_default_dtype())


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def skeleton(network: nn.Module, input_size: ImageSize, *, channels: int = 3) -> tuple[nn.Module, Tensor]:
    """Copy the structure of a network to the meta device, where running it computes shapes alone.

    Weights are not copied; mode, hooks and buffers of the network stay as they are.

    Args:
        network: Any network.
        input_size: Side of the image in pixels, or its height and width.
        channels: Channels of the image.

    Returns:
        The copy in evaluation mode, and an image ``1 x channels x H x W`` to run it on.

    Raises:
        ValueError: If the network is shared with its copies, as a ``FrozenTeacher`` is: probe its ``network``.
    """
    # deepcopy takes from the memo what it finds there, so that no weight is copied
    memo: dict[int, Any] = {id(each): _on_meta(each) for each in (*network.parameters(), *network.buffers())}
    ghost = _twin(network, memo)
    return ghost, torch.empty(1, channels, *height_width(input_size), device="meta", dtype=_dtype(network))


def _spec(output: NetOutput) -> NetSpec:
    features = output.features
    return NetSpec(
        num_classes=output.logits.shape[1],
        features=None
        if features is None
        else tuple(cast("tuple[int, int, int]", tuple(feature.shape[1:])) for feature in features),
        embedding=None if output.embedding is None else output.embedding.shape[1],
        branches=tuple(_spec(branch) for branch in output.branches),
    )


@torch.no_grad()
def probe(network: nn.Module, input_size: ImageSize, *, channels: int = 3) -> NetSpec:
    """Find the shapes of everything a network returns for one image, on the meta device and without computing it.

    Args:
        network: Network that returns logits or a `NetOutput`.
        input_size: Side of the image in pixels, or its height and width.
        channels: Channels of the image.

    Raises:
        ValueError: If the network is shared with its copies, as a ``FrozenTeacher`` is: probe its ``network``.
    """
    ghost, image = skeleton(network, input_size, channels=channels)
    output = ghost(image)
    if not isinstance(output, NetOutput):
        output = staged_forward(ghost, plan_for(ghost), image)
    return _spec(output)


def _disturb(network: nn.Module, generator: torch.Generator) -> None:
    """Change norms, biases and running statistics, because a fresh BatchNorm that a plan forgets is the identity."""
    for module in network.modules():
        for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items()):
            if tensor is None or not tensor.is_floating_point() or not tensor.numel():
                continue
            if tensor.dim() != 1 and bool((tensor != tensor.flatten()[0]).any()):
                continue  # random weights; constant ones, such as a layer scale, are changed
            if name in module._buffers and name not in ("running_mean", "running_var"):
                continue
            factor, shift = torch.rand(2, *tensor.shape, generator=generator, device="cpu").to(tensor)
            tensor.mul_(0.5 + factor)
            if name != "running_var":
                tensor.add_(0.2 * (shift - 0.5))


@torch.no_grad()
def check_plan(network: nn.Module, plan: StagePlan, input_size: ImageSize, channels: int = 3) -> None:
    """Compare a stage plan with the network's own forward, on two random images and a copy of the network.

    The copy is in evaluation mode and has other norms and biases, so that a norm that the plan leaves out shows in a
    network with fresh weights too. Weights, modes and torch's random numbers stay as they are. Nothing is done for a
    network on the meta device.

    Args:
        network: Any network.
        plan: Plan to check.
        input_size: Side of the images in pixels, or their height and width.
        channels: Channels of the images.

    Raises:
        ACKDError: If the plan cannot be run, or its logits differ from the network's own.
    """
    tensors = [*network.parameters(), *network.buffers()]
    if any(each.is_meta for each in tensors):
        return
    device = tensors[0].device if tensors else torch.device("cpu")
    name = type(network).__name__
    twin, generator = _twin(network), torch.Generator().manual_seed(0)
    _disturb(twin, generator)
    shape = (2, channels, *height_width(input_size))
    image = torch.randn(shape, generator=generator, device="cpu").to(device, _dtype(network))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_device(0, device)
        own = cast(Tensor, twin(image)).float()
        seed_device(0, device)
        try:
            staged = staged_forward(twin, plan, image).logits.float()
        except Exception as error:  # a wrong plan can fail in any way
            reason = str(error).strip().partition("\n")[0]
            raise ACKDError(
                f"the stage plan of {name} cannot be run at input size {input_size} ({reason}); its modules must be "
                "those that forward calls, in the same order"
            ) from error
    allowed = max(_TOLERANCE, 8 * torch.finfo(image.dtype).eps) * float(own.abs().nan_to_num(0.0, posinf=0.0).max())
    if staged.shape != own.shape or not torch.allclose(staged, own, rtol=0.0, atol=allowed, equal_nan=True):
        found = (
            f"logits differ by up to {float((staged - own).abs().max()):.3g}"
            if staged.shape == own.shape
            else f"logits have the shape {tuple(staged.shape)} instead of {tuple(own.shape)}"
        )
        raise ACKDError(
            f"the stage plan of {name} does not describe its forward ({found}); its modules must be those that forward "
            "calls, in the same order, with every norm and activation"
        )
