"""How a configuration names a student: network, weights to start from, frozen parts, learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.config_checks import check_network
from ackd_lightning.validation import Positive, check_arguments

InitBranches = Literal["fresh", "backbone"]
Backend = Literal["x86", "xnnpack"]
"""Kernels that a quantised network is for: those of onnxruntime and Inductor on x86, or XNNPACK on ARM and x86."""


@dataclass(frozen=True)
class StudentConfig:
    """A student with the weights it starts from, and how its parts are trained.

    Args:
        network: Name for ``create_model`` (such as resnet20), or a network.
        options: Options for ``create_model``; none by default.
        weights: Weight file to start from; None for fresh weights, or those of a given network. A head for other
            classes is replaced.
        pretrained: Start from the weights that timm or torchvision publish for the network.
        freeze: Parts that are not trained, BatchNorm statistics included: names of stages (stem, stage1, stage2, ...)
            or of modules of the network; what is both names the stage.
        backbone_lr_scale: Factor of the learning rate for everything before the classifier.
        init_branches: Weights of the stages that auxiliary learners own: "fresh" for random ones, "backbone" for those
            of the student. Their classifiers are fresh either way.
        taps: Names of the modules whose outputs are the stages; None for those that are found in the network.
        quantization: Kernels for which weights and activations are rounded to int8 while the student is fine-tuned
            (quantisation-aware training); None to train in floating point.

    Raises:
        ACKDError: If a value is not allowed, or values contradict each other.
    """

    network: str | nn.Module
    options: dict[str, Any] | None = None
    weights: str | None = None
    pretrained: bool = False
    freeze: tuple[str, ...] = ()
    backbone_lr_scale: Positive = 1.0
    init_branches: InitBranches = "fresh"
    taps: tuple[str, ...] | None = None
    quantization: Backend | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_arguments(type(self), vars(self))
        check_network(self, "student")
        for name in ("freeze", "taps"):
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else tuple(value))
            if value and self.quantization is not None:
                raise ACKDError(
                    f"{name} is {list(value)} in StudentConfig and names modules, and quantization turns the student "
                    f"into a graph without modules; leave {name} out"
                )


def as_student_config(given: str | nn.Module | StudentConfig | Mapping[str, Any]) -> StudentConfig:
    """Return a given student as a `StudentConfig`.

    Args:
        given: Name, network, configuration or its plain data.
    """
    if isinstance(given, StudentConfig):
        return given
    return StudentConfig(**given) if isinstance(given, Mapping) else StudentConfig(network=given)


def describe_student(config: StudentConfig, network: nn.Module) -> dict[str, Any] | None:
    """Return a student as plain data for a checkpoint, or None for a network that ``create_model`` does not build.

    The weights that it started from are left out: a checkpoint has its own.

    Args:
        config: The student.
        network: Network that was built or given.
    """
    name = getattr(network, "model_name", None)
    if name is None:
        return None
    plain = {key: list(each) if isinstance(each, tuple) else each for key, each in vars(config).items()}
    kept = {key: each for key, each in plain.items() if key not in ("weights", "pretrained")}
    return {**kept, "network": name, "options": dict(getattr(network, "model_options", {}))}
