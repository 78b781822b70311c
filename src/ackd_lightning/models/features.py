"""Stages of a network: their names, their outputs, and what needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.models.copies import WATCH, name_of
from ackd_lightning.models.outputs import as_map, first_tensor, logits_of
from ackd_lightning.types import NetOutput, NetSpec


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Names of the modules of a network whose outputs are its features.

    The network's own ``forward`` is always what runs; the outputs of these modules are kept. Stages of any network are
    found by `plan_for`. A network of your own can name them itself in an attribute ``stage_plan``.

    Attributes:
        features: Modules that return F_0 .. F_K, each called once: F_0 is the output of the stem, F_n that of stage n,
            and F_K the map that global pooling reads, after a final norm where there is one. Maps may be
            ``B x C x H x W``, ``B x H x W x C``, or tokens ``B x N x C``.
        classifier: Module that maps the embedding to logits; None where it is unknown.
        pooled: Whether the embedding is the mean of F_K over its positions.
    """

    features: tuple[str, ...]
    classifier: str | None = None
    pooled: bool = True


def _unknown_stages(whose: str, needed_by: str) -> ACKDError:
    return ACKDError(
        f"no stages were found in {whose}, and {needed_by} needs them; name the modules that end its stages in `taps`, "
        "or choose another network"
    )


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

    Examples:
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


def last_map(output: NetOutput, plan: StagePlan | None) -> Tensor:
    """Return the map whose mean over its positions is what the classifier reads.

    Args:
        output: Output of a network whose stages are known.
        plan: Stages of the network.

    Returns:
        F_K, ``B x C x H x W``; or the embedding ``B x D x 1 x 1`` where it is not the mean of F_K, as in vision
        transformers with a class token.
    """
    if plan is None or plan.pooled:
        return require_stages(output, "the network", "a classifier")[-1]
    return require_embedding(output, "the network", "a classifier")[:, :, None, None]


def last_shape(spec: NetSpec) -> tuple[int, int, int]:
    """Return the shape of `last_map` for one image.

    Args:
        spec: Shapes of a network whose stages are known.
    """
    if spec.pooled:
        return require_stages(spec, "the network", "a classifier")[-1]
    return (require_embedding(spec, "the network", "a classifier"), 1, 1)


def pooled(feature: Tensor) -> Tensor:
    """Average a feature map over its positions.

    Args:
        feature: Feature map, ``B x C x H x W``.

    Returns:
        ``B x C``.
    """
    return F.adaptive_avg_pool2d(feature, 1).flatten(1)


class _Watch:
    """Hooks on the modules of a plan, which keep what the modules return while a forward pass is watched.

    They are installed once, because torch.compile traces hooks and not their installation.
    """

    def __init__(self, network: nn.Module, plan: StagePlan) -> None:
        self.plan, self.active = plan, False
        self.values: dict[str, Any] = {}
        self.embedding: list[Any] = []
        self.modules = {name: network.get_submodule(name) for name in plan.features}
        self.handles = [module.register_forward_hook(_Keep(self, name)) for name, module in self.modules.items()]
        if plan.classifier is not None:
            self.modules[plan.classifier] = module = network.get_submodule(plan.classifier)
            self.handles.append(module.register_forward_pre_hook(_KeepInput(self)))

    def fits(self, network: nn.Module, plan: StagePlan) -> bool:
        """Return whether the hooks are on the modules that a plan names."""
        return self.plan == plan and all(network.get_submodule(name) is each for name, each in self.modules.items())


class _Keep:
    def __init__(self, watch: _Watch, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, module: nn.Module, args: Any, value: Any) -> None:
        if self.watch.active:
            self.watch.values[self.name] = value


class _KeepInput:
    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.watch.active:
            self.watch.embedding.append(first_tensor(args))


def watch(network: nn.Module, plan: StagePlan | None) -> None:
    """Install the hooks that `capture` needs, which it does by itself outside of torch.compile.

    Args:
        network: Network that the plan describes.
        plan: Stages of the network; without one nothing is done.
    """
    present: _Watch | None = getattr(network, WATCH, None)
    if plan is None or (present is not None and present.fits(network, plan)):
        return
    require_modules(network, plan)
    for handle in [] if present is None else present.handles:
        handle.remove()
    network.__dict__[WATCH] = _Watch(network, plan)


def capture(
    network: nn.Module, plan: StagePlan, given: Any, ratio: float, *, run: nn.Module | None = None
) -> tuple[Any, tuple[Tensor, ...], Tensor, dict[str, Any]]:
    """Run a network and keep the outputs of its stages.

    Args:
        network: Network that the plan describes.
        plan: Stages of the network.
        given: Argument of the network: images, or for a part of a network what that part reads.
        ratio: Height of the images divided by their width.
        run: Module that is called and calls the network; None for the network itself.

    Returns:
        What the network returns; the features as maps ``B x C x H x W``; the embedding ``B x D``; the features as the
        modules returned them, by name.
    """
    watch(network, plan)
    kept: _Watch = getattr(network, WATCH)
    kept.active = True
    try:
        output = (network if run is None else run)(given)
        values, read = dict(kept.values), list(kept.embedding)
    finally:
        kept.active = False
        kept.values.clear()
        kept.embedding.clear()
    prefix = getattr(network, "num_prefix_tokens", None)
    features = tuple(_map_of(network, name, values, ratio, prefix) for name in plan.features)
    embedding: Tensor = features[-1] if len(read) != 1 else read[0]
    if embedding.dim() > 2:
        embedding = pooled(embedding) if embedding.dim() == 4 else embedding.mean(dim=1)
    return output, features, embedding, values


def _map_of(network: nn.Module, name: str, values: dict[str, Any], ratio: float, prefix: int | None) -> Tensor:
    found = as_map(values[name], ratio, prefix) if name in values else None
    if found is None:
        what = f"a tensor {tuple(values[name].shape)}" if isinstance(values.get(name), Tensor) else "no tensor"
        problem = f"returns {what} and no map" if name in values else "was not called"
        raise ACKDError(
            f"module {name!r} of {name_of(network)} {problem}, and a feature is read there; name other modules"
        )
    return found


def staged_forward(network: nn.Module, plan: StagePlan | None, image: Tensor) -> NetOutput:
    """Run a network and return logits, stage outputs and the embedding.

    Args:
        network: Any network that maps images to logits.
        plan: Stages of the network. Without a plan the output has neither features nor an embedding.
        image: Images, ``B x C x H x W``.

    Returns:
        Logits ``B x K``, features F_0 .. F_K, embedding ``B x D``.

    Raises:
        ACKDError: If no logits are found in what the network returns.
    """
    if plan is None:
        return NetOutput(logits=logits_of(network(image), name_of(network)))
    output, features, embedding, _ = capture(network, plan, image, image.shape[2] / image.shape[3])
    return NetOutput(logits=logits_of(output, name_of(network)), features=features, embedding=embedding)


def require_modules(network: nn.Module, plan: StagePlan) -> None:
    """Refuse a plan that names modules which do not exist."""
    known = [name for name, _ in network.named_modules() if name]
    for each in (*plan.features, *((plan.classifier,) if plan.classifier else ())):
        if each not in known:
            raise ACKDError(
                f"the stage plan of {name_of(network)} names {each!r} and there is no such module; "
                f"{near_matches(each, known)}"
            )
