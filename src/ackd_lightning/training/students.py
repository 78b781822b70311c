"""The student of a training module: built, started from weights, frozen in parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import Method
from ackd_lightning.models.branches import PEER, peer_network
from ackd_lightning.models.copies import channels_by_name, image_channels, load_tensors, name_of
from ackd_lightning.models.finding import check_trainable, use_taps
from ackd_lightning.models.freezing import freeze, frozen_modules
from ackd_lightning.models.quantization import FakeQuantized
from ackd_lightning.models.start import Start, head_names, own_network, refuse_frozen_head, start
from ackd_lightning.models.stated import stated_options
from ackd_lightning.models.student import AuxiliaryLearner, BranchyStudent, Peer
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.models.teacher_base import Teacher
from ackd_lightning.models.weight_files import tell
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training.schedule import Recipe
from ackd_lightning.types import DataInfo


def build_student(
    config: StudentConfig, branches: Sequence[str] | None, data: DataInfo | None
) -> tuple[BranchyStudent, Start | None]:
    """Build a student with its auxiliary learners.

    Args:
        config: The student.
        branches: Auxiliary learners of the method; None for the paper's two.
        data: Classes, image size and normalisation of the data; None when unknown.

    Returns:
        The student, and what it was started from; None for fresh weights.

    Raises:
        ACKDError: If the network cannot be built or trained, or weights or frozen parts do not fit it.
    """
    if isinstance(config.network, nn.Module):
        if isinstance(config.network, Teacher):
            raise ACKDError(
                f"the student is a {type(config.network).__name__}, which does not learn; pass its `network`"
            )
        backbone = own_network(config.network)
    elif data is None:
        raise ACKDError(
            f"the student is named {config.network!r} and its number of classes is unknown; pass data=DataInfo(...)"
        )
    else:
        usual = channels_by_name(data.image_shape[0])
        if (config.options or {}).get("aux_logits"):
            raise ACKDError(
                "student.options.aux_logits is true and auxiliary classifiers of the network itself are not trained "
                "here; leave it out"
            )
        given = config.options or {}
        stated = {
            key: value
            for key, value in stated_options(config.network, config.weights).items()
            if key != "in_chans" and key not in given
        }
        if stated:
            said = ", ".join(f"{key} {value}" for key, value in stated.items())
            tell(f"the student {config.network} is built with {said}, as {config.weights} states")
        backbone = create_model(config.network, data.num_classes, **{**usual, **stated, **given})
    if config.taps:
        use_taps(backbone, config.taps, f"the student {name_of(backbone)}")
    classes = None if data is None else data.num_classes
    found = start(backbone, config, classes, None if data is None else data.class_names)
    if found is not None and data is not None:
        _compare_normalisation(found, data)
    if not backbone.training:
        backbone.train()  # as `load_student` returns it; parts that are in evaluation mode on purpose stay
    size = 32 if data is None else data.input_size
    if isinstance(config.network, nn.Module):
        check_trainable(backbone, size)
    if config.quantization is not None:
        backbone = FakeQuantized(backbone, config.quantization, size, channels=_channels(backbone, data))
    student = BranchyStudent(backbone, branches, num_classes=classes, input_size=size)
    if config.init_branches == "backbone":
        start_branches(student)
    freeze(backbone, config.freeze)
    if found is not None and found.fresh and config.quantization is None:
        refuse_frozen_head(backbone, found.origin)
    student.branches.requires_grad_(True).train()  # copies of frozen stages, too
    keep_frozen_in_evaluation(student)
    return student, found


def check_quantization(config: StudentConfig, method: Method, recipe: Recipe, *, compiled: bool | str) -> None:
    """Refuse what does not go with a student that is fine-tuned for int8.

    Args:
        config: The student.
        method: Method, built or not yet.
        recipe: Recipe of the training.
        compiled: Whether the student is compiled.

    Raises:
        ACKDError: Naming the setting.
    """
    if config.quantization is None:
        return
    where = f"student.quantization is {config.quantization!r}"
    if method.teacher not in ("none", "logits") or method.branches != () or method.auxiliary_parameters():
        raise ACKDError(
            f"method {type(method).__name__} reads more than the student's logits and {where}, which turns the student "
            "into a graph without stages; fine-tune with a method that reads logits alone, such as KD"
        )
    if recipe.ema_decay is not None:
        raise ACKDError(f"recipe.ema_decay is {recipe.ema_decay} and {where}; set one of them to null")
    if compiled:
        raise ACKDError(f"compile is {compiled} and {where}; set compile to false, as the student is a graph already")


def check_trained(student: BranchyStudent, config: StudentConfig, started: object) -> None:
    """Refuse to fine-tune a student for int8 that was not trained before.

    Args:
        student: The student.
        config: Its configuration.
        started: What the student was started from; None for fresh weights.

    Raises:
        ACKDError: If it has fresh weights.
    """
    if config.quantization is not None and started is None and isinstance(config.network, str):
        raise ACKDError(
            f"student.quantization is {config.quantization!r} and {name_of(student)} has fresh weights, and "
            "quantisation-aware training fine-tunes a trained student; name its file in student.weights"
        )


def _channels(network: nn.Module, data: DataInfo | None) -> int:
    known = data is not None and bool(data.channels or data.mean)
    return data.image_shape[0] if data is not None and known else image_channels(network)


def _compare_normalisation(found: Start, data: DataInfo) -> None:
    """Say that weights were trained on images with another mean or standard deviation."""
    if found.mean is None or found.std is None or data.mean is None or data.std is None:
        return
    pairs = [*zip(found.mean, data.mean, strict=False), *zip(found.std, data.std, strict=False)]
    if any(abs(there - here) > 0.02 for there, here in pairs):
        mean, std = ([round(each, 3) for each in values] for values in (found.mean, found.std))
        tell(
            f"{found.origin} was trained on images with mean {mean} and std {std}, and the data are normalised with "
            f"mean {[round(each, 3) for each in data.mean]}; the student adapts while it trains, or give the data "
            "these values"
        )


@torch.no_grad()
def start_branches(student: BranchyStudent) -> None:
    """Give auxiliary learners the weights of the backbone's stages; their classifiers stay fresh.

    Peers of another architecture are left as they are.

    Args:
        student: Student whose backbone has the weights.
    """
    heads = tuple(f"{name}." for name in head_names(student.backbone))
    state = {key: each for key, each in student.backbone.state_dict().items() if not key.startswith(heads)}
    for network in _same_structure(student):
        own = network.state_dict()
        load_tensors(network, {key: each for key, each in state.items() if key in own}, strict=False)


def _same_structure(student: BranchyStudent) -> Iterator[nn.Module]:
    """Networks of the auxiliary learners whose layers have the names and shapes of the backbone's."""
    for spec, learner in zip(student.specs, student.branches, strict=True):
        if isinstance(learner, AuxiliaryLearner):
            yield learner.suffix.network
        elif isinstance(learner, Peer) and peer_network(spec) == PEER:
            yield learner.network
            yield from (each.suffix.network for each in learner.branches if isinstance(each, AuxiliaryLearner))


def slow_parameters(student: BranchyStudent, config: StudentConfig) -> list[nn.Parameter]:
    """Return the parameters that learn at `StudentConfig.backbone_lr_scale`.

    Args:
        student: The student.
        config: Its configuration.
    """

    def body(network: nn.Module, heads: Iterable[nn.Module]) -> list[nn.Parameter]:
        head = {id(each) for module in heads for each in module.parameters()}
        return [each for each in network.parameters() if id(each) not in head]

    names = head_names(student.backbone)
    found = body(student.backbone, map(student.backbone.get_submodule, names))
    if config.init_branches == "backbone":
        for network in _same_structure(student):
            found += body(network, map(network.get_submodule, names))
    return found


def keep_frozen_in_evaluation(module: nn.Module) -> None:
    """Put every part whose parameters are all frozen into evaluation mode, so that its statistics stay.

    Args:
        module: Module in training mode.
    """
    for part in frozen_modules(module):
        part.eval()
