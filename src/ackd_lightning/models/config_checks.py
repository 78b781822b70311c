"""What the configurations of a student and of a teacher have in common."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ackd_lightning.errors import ACKDError


def check_network(config: Any, role: Literal["student", "teacher"]) -> None:
    """Refuse what is no network, and options and weights that contradict each other.

    Args:
        config: `StudentConfig` or `TeacherConfig`.
        role: Which of the two it is.

    Raises:
        ACKDError: If a value is not allowed, or values contradict each other.
    """
    place, given = f"in {type(config).__name__}", isinstance(config.network, nn.Module)
    if not given and not isinstance(config.network, str):
        raise ACKDError(f"network is {config.network!r} {place}; it must be a name for create_model or a network")
    if config.options is not None and not isinstance(config.options, dict):
        raise ACKDError(f"options is {config.options!r} {place}; it must be a dict of create_model's options")
    if given and config.options:
        raise ACKDError(
            f"options is {config.options!r} {place} and the {role} is a network; build it with these options, or give "
            "it by name"
        )
    if given and config.pretrained:
        raise ACKDError(
            f"pretrained is True {place} and the {role} is a network, which has weights already; give it by name"
        )
    if config.pretrained and config.weights is not None:
        raise ACKDError(
            f"{role}.pretrained is true and {role}.weights is {config.weights!r}; choose one of them to start from "
            "(weights null drops what a configuration gives)"
        )
