"""Weights that a student starts from: those of a file, or those that timm and torchvision publish."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import dtype_of, examples, load_tensors, name_of
from ackd_lightning.models.finding import heads_in, plan_for
from ackd_lightning.models.inception import say_transform
from ackd_lightning.models.known import remembered
from ackd_lightning.models.metadata import typed_metadata
from ackd_lightning.models.outputs import logits_of, same_logits
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.models.weight_files import local_file, read_tensors, tell
from ackd_lightning.models.weights import as_torch_loads, check_fit, digest, own_names


@dataclass(frozen=True)
class Start:
    """What a network was started from.

    Attributes:
        origin: File or published weights, in words.
        notes: Origin as plain data for checkpoints and exports.
        class_names: Classes of the head that was loaded; None when they are unknown, or the head is fresh.
        fresh: Whether the head is fresh.
        mean: Mean of each channel that the weights were trained with; None when unknown.
        std: Standard deviation of each channel, as ``mean``.
    """

    origin: str
    notes: dict[str, Any]
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    fresh: bool = False


def start(
    network: nn.Module, config: StudentConfig, num_classes: int | None, names: Sequence[str] | None = None
) -> Start | None:
    """Load the weights that a student starts from, and say in one line what was loaded.

    Args:
        network: Network to fill in place.
        config: The student.
        num_classes: Number K of classes of the data; None when unknown.
        names: Names of these classes; None when unknown. Where all are among those of the weights, a head for more
            classes is cut to them.

    Returns:
        What was loaded; None for a student that starts from fresh weights, or from those of a given network.

    Raises:
        ACKDError: If there are no such weights, or they do not fit.
    """
    metadata: dict[str, str] | None = None
    headed: str | None = None  # method whose head stands in place of the network's own
    if config.pretrained:
        from ackd_lightning.models.zoo import named
        from ackd_lightning.models.zoo.pretrained import pretrained  # imports timm

        source, stated = pretrained(str(config.network), config.options)
        tensors: dict[str, Tensor] = source.state_dict()
        if getattr(source, "transform_input", False):  # Inception networks of torchvision change the normalisation
            network.transform_input = True  # type: ignore[assignment]
            named(network, str(config.network), {**(config.options or {}), "transform_input": True})
        origin, notes = f"{config.network} ({stated['weights']})", {"published": str(stated["weights"])}
    elif config.weights is not None:
        file = local_file(config.weights)
        tensors, metadata = read_tensors(file)
        stated = typed_metadata(metadata, str(file))
        origin, notes = str(file), {"weights": Path(file).name, "sha256": digest(file)}
        if "head" in metadata:
            headed = metadata.get("method", "a method")
            if config.quantization is not None:
                raise ACKDError(
                    f"{origin} holds a network with a head of {headed} in place of its own classifier, which "
                    "fine-tuning for int8 would lose; quantise it after training: ackd export RUN --format onnx --int8"
                )
    else:
        return None
    known, cut = tuple(stated.get("class_names") or ()), ""
    if names is not None and set(names) < set(known) and len(names) == num_classes:
        cut = f", with the rows of its head for {num_classes} of its {len(known)} classes, by name"
        tensors = _cut(network, own_names(tensors, network.state_dict(), origin), known, names)
        known = tuple(names)
    fresh = _load(network, tensors, origin, num_classes, headed)
    kept = ", with its head" + ("" if known else ", whose classes are taken in their order")
    tell(f"the student starts from {origin}{fresh or cut or kept}")
    if metadata is not None:
        say_transform(network, metadata, origin)
    mean, std = (tuple(stated[key]) if stated.get(key) else None for key in ("mean", "std"))
    return Start(origin, notes, None if fresh else known or None, mean, std, fresh=bool(fresh))


def _cut(
    network: nn.Module, tensors: Mapping[str, Tensor], there: Sequence[str], here: Sequence[str]
) -> dict[str, Tensor]:
    """Return tensors in which those with a row for each class of the weights have the rows of the data's classes."""
    own, rows = network.state_dict(), [there.index(name) for name in here]
    shapes = {
        key: (len(there), *own[key].shape[1:]) for key in tensors if key in own and own[key].shape[:1] == (len(here),)
    }
    return {key: each[rows] if shapes.get(key) == each.shape else each for key, each in tensors.items()}


def _load(
    network: nn.Module, tensors: Mapping[str, Tensor], origin: str, num_classes: int | None, headed: str | None
) -> str:
    """Load what fits; return what is said of a fresh head, or nothing where the head was loaded."""
    own, name = network.state_dict(), getattr(network, "model_name", type(network).__name__)
    tensors = own_names(tensors, own, origin)
    if tensors.keys() != own.keys():
        tensors = as_torch_loads(tensors, network)
    missing = {key for key in own if key not in tensors and not key.endswith("num_batches_tracked")}
    heads = tuple(f"{name}." for name in head_names(network))
    other = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    fresh, said = set[str](), ""
    sizes = {tensors[key].shape[0] if tensors[key].ndim else 0 for key in other}
    rows = all(own[key].ndim and own[key].shape[1:] == tensors[key].shape[1:] for key in other)
    if other and not missing and rows and len(sizes) == 1 and {own[key].shape[0] for key in other} == {num_classes}:
        fresh, said = set(other), f"; its head for {sizes.pop()} classes is replaced by a fresh one for {num_classes}"
    elif missing and not other and all(key.startswith(heads) for key in missing):
        lost = "which has no head" if headed is None else f"whose head of {headed} is left out"
        fresh, said = missing, f", {lost}; that for {num_classes} classes is fresh"
    body = {key: each for key, each in tensors.items() if key not in fresh}
    body |= {key: own[key] for key in own if key in fresh or (key not in body and key.endswith("num_batches_tracked"))}
    check_fit(body, own, Path(origin), name)
    load_tensors(network, body)
    return said


def head_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that map the embedding to logits.

    Args:
        network: Any network.
    """
    ask: Any = getattr(network, "get_classifier", None)  # of timm
    found = ask() if callable(ask) else None
    modules = found if isinstance(found, (tuple, list)) else [found]
    own = tuple(name for name, module in network.named_modules() if any(module is each for each in modules))
    if not own:
        plan = plan_for(network)
        own = () if plan is None or plan.classifier is None else (plan.classifier,)
    heads = remembered(network, ("heads",), lambda: heads_in(network))  # timm does not name all that VOLO has
    if heads := (*own, *(name for name in heads if not f"{name}.".startswith(tuple(f"{each}." for each in own)))):
        return heads
    weighted = [name for name, module in network.named_modules() if any(True for _ in module.parameters(recurse=False))]
    return tuple(weighted[-1:])


@torch.no_grad()
def match_head(
    network: nn.Module, there: Sequence[str], here: Sequence[str], origin: str, image: tuple[int, int, int]
) -> None:
    """Bring the rows of a loaded head into the order of the data's classes, or make it fresh for other classes.

    Args:
        network: Network whose head was loaded.
        there: Classes of the head.
        here: Classes of the data.
        origin: Where the head comes from, in words.
        image: Channels, height and width of the images.

    Raises:
        ACKDError: If more than the head depends on the classes, or a head for other classes cannot be made fresh or is
            frozen.
    """
    if tuple(there) == tuple(here):
        return
    names = head_names(network)
    missing = sorted(set(here) - set(there))
    place = {name: number for number, name in enumerate(there)}
    order = [*reversed(range(len(here)))] if missing else [place[name] for name in here]
    if not _is_reordered(network, names, order, image):
        raise ACKDError(
            f"the classes of {origin} are not those of the data in the same order, and with the rows of "
            f"{', '.join(names)} the logits of {name_of(network)} do not change their order; give the data the classes "
            "of the file in their order, or choose a network with a layer as its head"
        )
    if not missing:
        _reorder(network, names, order)
        tell(f"the head of {origin} is reordered to the classes of the data")
        return
    for layer in (each for name in names for each in network.get_submodule(name).modules()):
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
        elif any(each.shape[:1] == (len(there),) for each in layer.parameters(recurse=False)):
            raise ACKDError(
                f"the head of {origin} does not know the class {missing[0]!r}, and it has no layer that can be made "
                "fresh; start from a network of the data's classes"
            )
    refuse_frozen_head(network, origin)
    tell(f"the head of {origin} is replaced by a fresh one, because it does not know the class {missing[0]!r}")


def _reorder(network: nn.Module, heads: Sequence[str], order: Sequence[int]) -> None:
    """Bring the rows of heads into another order, in place."""
    inside = [layer for name in heads for layer in network.get_submodule(name).modules()]
    layers = [layer for layer in inside if not isinstance(layer, (_NormBase, nn.LayerNorm))]
    for parameter in {each for layer in layers for each in layer.parameters(recurse=False)}:
        if parameter.shape[:1] == (len(order),):  # a head can have layers before the one that counts classes
            parameter.copy_(parameter[order])


def _is_reordered(network: nn.Module, heads: Sequence[str], order: Sequence[int], image: tuple[int, int, int]) -> bool:
    """Whether the logits of a copy have another order once the rows of its heads have it."""
    channels, *size = image
    *_, (copied, images) = examples(network, (size[0], size[1]), channels=channels)

    def logits() -> Tensor:
        torch.default_generator.manual_seed(0)  # for dropout that evaluation does not turn off
        return logits_of(copied(images)).float()

    with torch.random.fork_rng(devices=[]):
        before = logits()
        _reorder(copied, heads, order)
        return same_logits(logits(), before[:, order], dtype_of(network))


def refuse_frozen_head(network: nn.Module, origin: str) -> None:
    """Refuse to keep a fresh head frozen.

    Args:
        network: Network whose head is fresh.
        origin: Where its other weights come from, in words.

    Raises:
        ACKDError: If a part of its head does not learn.
    """
    for name in head_names(network):
        if not all(each.requires_grad for each in network.get_submodule(name).parameters()):
            raise ACKDError(
                f"student.freeze covers {name!r}, whose weights are fresh because {origin} has other classes; name the "
                "other parts alone"
            )


def refuse_wrapper(network: nn.Module, role: str, wrappers: Sequence[str] = ("OptimizedModule",)) -> None:
    """Refuse a network that is wrapped in another module.

    Args:
        network: Network that was given.
        role: student or teacher.
        wrappers: Names of the classes that are refused; those that torch.compile returns.

    Raises:
        ACKDError: Naming the network inside.
    """
    name = type(network).__name__
    inside = next((each for each in ("module", "_orig_mod") if name in wrappers and hasattr(network, each)), None)
    if inside is not None:
        raise ACKDError(f"the {role} is wrapped in {name}; pass the network in it, {role}.{inside}")


def own_network(network: nn.Module) -> nn.Module:
    """Check a given network, and bring its weights into the precision in which they are trained.

    Args:
        network: Network that was given as a student; converted in place.

    Returns:
        The network.

    Raises:
        ACKDError: If it cannot be trained.
    """
    name = type(network).__name__
    refuse_wrapper(network, "student", _WRAPPERS)
    parameters = list(network.parameters())
    if any(isinstance(each, nn.parameter.UninitializedParameter) for each in parameters):
        raise ACKDError(f"the student {name} has lazy layers without a shape; run it on an image first")
    if any(each.is_meta for each in (*parameters, *network.buffers())):
        raise ACKDError(f"the student {name} has no weights, because it is on the meta device; build it on the CPU")
    if any(each.is_inference() for each in parameters):
        raise ACKDError(f"the student {name} was made in torch.inference_mode() and cannot learn; build it outside")
    if not any(each.requires_grad for each in parameters):
        raise ACKDError(
            f"the student {name} has no parameter that requires a gradient; call student.requires_grad_(True), or pass "
            "the network that is to learn"
        )
    other = sorted({str(each.dtype) for each in parameters if each.dtype != torch.float32 and each.is_floating_point()})
    if other:
        tell(f"the student {name} has {', '.join(other)} weights, which are trained in float32")
        network.float()
    return network


_WRAPPERS = ("DataParallel", "DistributedDataParallel", "OptimizedModule")
