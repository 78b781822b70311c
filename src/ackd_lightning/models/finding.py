"""Where the stages of a network are, and the shapes of what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError, count_of, first_line, near_matches
from ackd_lightning.models.copies import examples, hooks_remedy, image_channels, name_of, unwrapped
from ackd_lightning.models.features import StagePlan, _unknown_stages, require_modules, staged_forward
from ackd_lightning.models.known import remembered
from ackd_lightning.models.outputs import logits_of
from ackd_lightning.models.stages import stage_names
from ackd_lightning.models.tracing import Trace, scores_images, trace
from ackd_lightning.types import ImageSize, NetOutput, NetSpec, height_width


def native_sizes(network: nn.Module, input_size: ImageSize | None = None) -> Iterator[ImageSize]:
    """Yield image sizes that a network may be able to read, the one that it was designed for first.

    Args:
        network: Any network.
        input_size: Height and width in pixels of the images that it will get; None when unknown.
    """
    stated = getattr(network, "pretrained_cfg", None)
    size = stated.get("input_size") if isinstance(stated, dict) else None
    own = getattr(network, "image_size", None) if size is None else size[-2:]
    fixed = getattr(_sized(network), "img_size", None) or getattr(getattr(network, "config", None), "image_size", None)
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
    ran, found = remembered(network, ("stages", input_size), lambda: _find_stages(network, input_size))
    if ran:  # else another size may be what it needs
        network.__dict__["stage_plan"] = found
    return found


def _find_stages(network: nn.Module, input_size: ImageSize | None) -> tuple[bool, StagePlan | None]:
    """Whether a copy of a network could be run, and the stages that were found."""
    for size in native_sizes(network, input_size):
        if (result := traced(network, size)) is not None:
            copied, _, record = result
            names = stage_names(copied, record, height_width(size))
            return True, StagePlan(names, record.classifier, names[-1] in record.pooled) if names else None
    return False, None


def heads_in(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that make the logits, as they are found by running a copy.

    Args:
        network: Any network.
    """
    result = traced(network)
    return () if result is None else result[2].heads


def check_trainable(network: nn.Module, input_size: ImageSize) -> None:
    """Refuse a network that cannot learn from the cross-entropy of its outputs.

    Args:
        network: Network that was given as a student.
        input_size: Height and width of the images in pixels.

    Raises:
        ACKDError: If no gradient reaches its outputs, or they are probabilities.
    """
    result = traced(network, input_size)
    if result is None or isinstance(network, torch.jit.ScriptModule):
        return
    copied, images, record = result
    node = record.logits.grad_fn
    if node is None:  # no path leads from the images; one from the weights is enough
        for own, each in zip(network.parameters(), copied.parameters(), strict=True):
            each.requires_grad_(own.requires_grad)
        with torch.enable_grad():
            node = logits_of(copied(images)).grad_fn
    if node is None:
        raise ACKDError(
            f"no gradient reaches the outputs of the student {name_of(network)}; compute them without torch.no_grad() "
            "and detach()"
        )
    if node.name().startswith(("SoftmaxBackward", "SigmoidBackward")):
        raise ACKDError(
            f"the outputs of the student {name_of(network)} are probabilities, and the losses need logits; leave out "
            "its last softmax or sigmoid"
        )


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
    plan = remembered(network, ("taps", *names), lambda: _tapped(network, names, whose))
    network.__dict__["stage_plan"] = plan
    return plan


def _tapped(network: nn.Module, names: Sequence[str], whose: str) -> StagePlan:
    result = traced(network)
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
    return StagePlan((*first, *ordered), record.classifier, ordered[-1] in record.pooled)


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
    network = unwrapped(network)
    height, width = height_width(input_size)
    works = next((size for size in native_sizes(network) if traced(network, size) is not None), None)
    remedy = hooks_remedy(network) if works is None else f"; it can read {' x '.join(map(str, height_width(works)))}"
    option = next((each for each in ("img_size", "image_size") if hasattr(_sized(network), each)), None)
    if option is not None:
        remedy += f", or others with the network's option {option}"
    if channels is not None and channels != (own := image_channels(network)):
        remedy = f"; its first convolution reads {count_of(own, 'channel')} and the images have {channels}"
    assert reason is not None  # there is an example of every network
    raise ACKDError(
        f"{getattr(network, 'model_name', name_of(network))} cannot read images of {height} x {width} pixels "
        f"({first_line(reason, 300)}){remedy}"
    ) from reason


def _sized(network: nn.Module) -> Any:
    """Return what states the image size of a network, as timm and torchvision name it."""
    return network if hasattr(network, "image_size") else getattr(network, "patch_embed", None)


def check_plan(network: nn.Module, plan: StagePlan, input_size: ImageSize, channels: int | None = None) -> None:
    """Check that the modules which a stage plan names exist, and are called in this order with maps as output.

    Args:
        network: Any network.
        plan: Plan to check.
        input_size: Height and width of the images in pixels.
        channels: Channels of the images; None for those of the network's first convolution.

    Raises:
        ACKDError: If they do not, or the classifier returns no logits.
    """
    require_modules(network, plan)
    remembered(network, ("plan", plan, input_size, channels), lambda: _check_plan(network, plan, input_size))


def _check_plan(network: nn.Module, plan: StagePlan, input_size: ImageSize) -> None:
    name = name_of(network)
    if len(plan.features) < 2 or len(set(plan.features)) < len(plan.features):
        raise ACKDError(
            f"the stage plan of {name} is {list(plan.features)}; name the stem and at least one stage, each once"
        )
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
    if plan.classifier is not None:
        called = record.calls.get(plan.classifier)
        module = network.get_submodule(plan.classifier)
        if called is None or not scores_images(module, called.value, record.logits):  # a map is averaged later
            raise ACKDError(
                f"the stage plan of {name} names the classifier {plan.classifier!r}, which does not return the logits; "
                "name the one that does, or None"
            )
