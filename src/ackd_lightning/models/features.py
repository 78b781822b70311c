"""Stages of a network: where they are, what flows between them, and what a network returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.models.stages import stage_names
from ackd_lightning.models.tracing import (
    WATCH,
    Trace,
    as_map,
    examples,
    first_tensor,
    image_channels,
    logits_of,
    name_of,
    skeleton,
    trace,
)
from ackd_lightning.types import ImageSize, NetOutput, NetSpec, height_width

__all__ = ["image_channels", "skeleton"]


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


def native_sizes(network: nn.Module, input_size: ImageSize | None = None) -> Iterator[ImageSize]:
    """Yield image sizes that a network may be able to read, the one that it was designed for first.

    Args:
        network: Any network.
        input_size: Height and width in pixels of the images that it will get; None when unknown.
    """
    stated = getattr(network, "pretrained_cfg", None)
    size = stated.get("input_size") if isinstance(stated, dict) else None
    own = getattr(network, "image_size", None) if size is None else size[-2:]
    fixed = getattr(_sized(network), "img_size", None)
    given = [fixed, own, 224, input_size, 32, 28]
    seen: list[ImageSize] = []
    for each in given:
        size = tuple(each) if isinstance(each, tuple | list) and len(each) == 2 else each
        if (isinstance(size, int) or (isinstance(size, tuple) and all(isinstance(side, int) for side in size))) and (
            size not in seen
        ):
            seen.append(size)
            yield size


def traced(network: nn.Module, input_size: ImageSize | None = None) -> tuple[nn.Module, Tensor, Trace] | None:
    """Run a copy of a network on an example and record its calls.

    Args:
        network: Any network.
        input_size: Height and width of the images in pixels; None for the size that the network was designed for.

    Returns:
        The copy, the images, and the record; None if the network cannot be run.
    """
    for size in native_sizes(network) if input_size is None else (input_size,):
        for copied, image in examples(network, size):
            try:
                return copied, image, trace(copied, image)
            except ACKDError:
                raise
            except Exception:  # another size, or real numbers, may be what it needs
                continue
    return None


def plan_for(network: nn.Module, input_size: ImageSize | None = None) -> StagePlan | None:
    """Return the stages of a network, or None when it has none that can be found.

    They are those of the network's attribute ``stage_plan``, or else are found by running a copy, as described in
    ``models/stages.py``, and stored in that attribute.

    Args:
        network: Any network.
        input_size: Height and width in pixels of the images that it will get, for networks that read no other.

    Raises:
        ACKDError: If the attribute ``stage_plan`` is something else.
    """
    plan = getattr(network, "stage_plan", None)
    if plan is not None and not isinstance(plan, StagePlan):
        raise ACKDError(
            f"stage_plan of {name_of(network)} is {plan!r}; set it to a StagePlan with the names of modules, such as "
            "StagePlan(('layer1', 'layer2'))"
        )
    if plan is not None or "stage_plan" in network.__dict__:
        return plan
    found: StagePlan | None = None
    for size in native_sizes(network, input_size):
        result = traced(network, size)
        if result is not None:
            copied, _, record = result
            names = stage_names(copied, record, height_width(size))
            if names:
                found = StagePlan(names, record.classifier, names[-1] in record.pooled)
            break
    network.__dict__["stage_plan"] = found
    return found


def use_taps(network: nn.Module, names: Sequence[str], whose: str = "the network") -> StagePlan:
    """Take the outputs of named modules as the features of a network.

    Args:
        network: Any network; its attribute ``stage_plan`` is set.
        names: Names of modules in the order in which they are called: the outputs of stages 1 .. K.
        whose: Name of the network in the error message.

    Raises:
        ACKDError: If a name is unknown, a module is not called exactly once, or does not return a map.
    """
    if not names or len(set(names)) < len(names):
        raise ACKDError(f"taps is {list(names)}; name each module of {whose} that ends a stage once, or leave taps out")
    known = [name for name, _ in network.named_modules() if name]
    for name in names:
        if name not in known:
            raise ACKDError(f"taps names {name!r} and {whose} has no such module; {near_matches(name, known)}")
    result = next((found for size in native_sizes(network) if (found := traced(network, size)) is not None), None)
    if result is None:
        raise ACKDError(f"taps is {list(names)} and {whose} cannot be run on an example; leave taps out")
    _, _, record = result
    for name in names:
        if name not in record.calls or record.calls[name].shape is None:
            problem = "is not called exactly once" if name not in record.calls else "does not return a feature map"
            maps = [each.name for each in record.spine if each.shape is not None and each.depth <= 1]
            raise ACKDError(f"taps names {name!r} of {whose}, which {problem}; these do: {', '.join(maps[:12])}")
    ordered = sorted(names, key=lambda name: record.calls[name].end)
    if list(names) != ordered:
        raise ACKDError(f"taps is {list(names)} and {whose} calls them in the order {ordered}; give that order")
    start = record.calls[ordered[0]].start
    first = [each.name for each in record.spine if each.shape is not None and each.end < start][-1:]
    plan = StagePlan((*first, *ordered), record.classifier, ordered[-1] in record.pooled)
    network.__dict__["stage_plan"] = plan
    return plan


def _unknown_stages(whose: str, needed_by: str) -> ACKDError:
    return ACKDError(
        f"no stages were found in {whose}, and {needed_by} needs them; name the modules that end its stages in `taps`, "
        "or choose another network"
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
    _require_modules(network, plan)
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


def _spec(output: NetOutput, plan: StagePlan | None = None) -> NetSpec:
    features = output.features
    return NetSpec(
        num_classes=output.logits.shape[1],
        features=None
        if features is None
        else tuple(cast("tuple[int, int, int]", tuple(feature.shape[1:])) for feature in features),
        embedding=None if output.embedding is None else output.embedding.shape[1],
        branches=tuple(_spec(branch) for branch in output.branches),
        pooled=plan is None or plan.pooled,
    )


@torch.no_grad()
def probe(network: nn.Module, input_size: ImageSize, *, channels: int | None = None) -> NetSpec:
    """Find the shapes of everything that a network returns for one image, without computing it where possible.

    Args:
        network: Network that returns logits or a `NetOutput`.
        input_size: Height and width of the image in pixels.
        channels: Channels of the image; None for those of the network's first convolution.

    Raises:
        ValueError: If the network is shared with its copies, as a ``FrozenTeacher`` is: probe its ``network``.
        ACKDError: If the network cannot read images of this size.
    """
    reason: Exception | None = None
    for copied, image in examples(network, input_size, channels=channels):
        try:
            if isinstance(output := copied(image), NetOutput):
                return _spec(output, getattr(network, "plan", None))
            plan = plan_for(network, input_size)
            return _spec(staged_forward(copied, plan, image), plan)
        except ACKDError:
            raise
        except Exception as error:  # what cannot be run without numbers is run with them
            reason = error
    height, width = height_width(input_size)
    works = next((size for size in native_sizes(network) if traced(network, size) is not None), None)
    remedy = "" if works is None else f"; it can read {' x '.join(map(str, height_width(works)))}"
    option = next((each for each in ("img_size", "image_size") if hasattr(_sized(network), each)), None)
    if option is not None:
        remedy += f", or others with the network's option {option}"
    said = (str(reason).strip() or type(reason).__name__).partition("\n")[0]
    raise ACKDError(
        f"{getattr(network, 'model_name', name_of(network))} cannot read images of {height} x {width} pixels "
        f"({said}){remedy}"
    ) from reason


def _sized(network: nn.Module) -> Any:
    """Return what states the image size of a network, as timm and torchvision name it."""
    return network if hasattr(network, "image_size") else getattr(network, "patch_embed", None)


def _require_modules(network: nn.Module, plan: StagePlan) -> None:
    """Refuse a plan that names modules which do not exist."""
    known = [name for name, _ in network.named_modules() if name]
    for each in (*plan.features, *((plan.classifier,) if plan.classifier else ())):
        if each not in known:
            raise ACKDError(
                f"the stage plan of {name_of(network)} names {each!r} and there is no such module; "
                f"{near_matches(each, known)}"
            )


def check_plan(network: nn.Module, plan: StagePlan, input_size: ImageSize, channels: int | None = None) -> None:
    """Check that the modules which a stage plan names exist, and are called in this order with maps as output.

    Args:
        network: Any network.
        plan: Plan to check.
        input_size: Height and width of the images in pixels.
        channels: Channels of the images; None for those of the network's first convolution.

    Raises:
        ACKDError: If they do not.
    """
    _require_modules(network, plan)
    name = name_of(network)
    result = traced(network, input_size)
    if result is None:
        return  # said by `probe`, with the reason
    record = result[2]
    for each in plan.features:
        if each not in record.calls or record.calls[each].shape is None:
            problem = "is not called exactly once" if each not in record.calls else "does not return a feature map"
            raise ACKDError(f"the stage plan of {name} names {each!r}, which {problem}; name another module")
    ordered = sorted(plan.features, key=lambda each: record.calls[each].end)
    if list(plan.features) != ordered:
        raise ACKDError(f"the stage plan of {name} is {list(plan.features)}, and they are called as {ordered}")
