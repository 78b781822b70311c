"""The student of a training module: built, started from weights, frozen in parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import name_of
from ackd_lightning.models.finding import check_trainable, use_taps
from ackd_lightning.models.freezing import freeze, frozen_modules
from ackd_lightning.models.start import Start, head_names, own_network, start
from ackd_lightning.models.student import AuxiliaryLearner, BranchyStudent, Peer
from ackd_lightning.models.student_config import StudentConfig
from ackd_lightning.models.teacher_base import Teacher
from ackd_lightning.models.weight_files import tell
from ackd_lightning.models.zoo import create_model
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
        channels = data.image_shape[0]
        usual = {"in_chans": channels} if channels != 3 else {}
        backbone = create_model(config.network, data.num_classes, **{**usual, **(config.options or {})})
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
    student = BranchyStudent(backbone, branches, num_classes=classes, input_size=size)
    if config.init_branches == "backbone":
        start_branches(student)
    freeze(backbone, config.freeze)
    student.branches.requires_grad_(True).train()  # copies of frozen stages, too
    keep_frozen_in_evaluation(student)
    return student, found


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
    for spec, learner in zip(student.specs, student.branches, strict=True):
        if isinstance(learner, AuxiliaryLearner):
            own = learner.suffix.network.state_dict()
            learner.suffix.network.load_state_dict(
                {key: each for key, each in state.items() if key in own}, strict=False
            )
        elif isinstance(learner, Peer) and spec == "peer":
            learner.network.load_state_dict(state, strict=False)


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
        for spec, learner in zip(student.specs, student.branches, strict=True):
            if isinstance(learner, AuxiliaryLearner):
                found += body(learner, map(learner.suffix.network.get_submodule, names))
            elif isinstance(learner, Peer) and spec == "peer":
                found += body(learner.network, map(learner.network.get_submodule, names))
    return found


def keep_frozen_in_evaluation(module: nn.Module) -> None:
    """Put every part whose parameters are all frozen into evaluation mode, so that its statistics stay.

    Args:
        module: Module in training mode.
    """
    for part in frozen_modules(module):
        part.eval()
