"""Names of auxiliary learners: ``DnBm`` for a branch of the student, everything else for a network of its own.

A network may have branches itself, which its name lists: ``peer+D3B1+D2B2``.
"""

from __future__ import annotations

import re

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import StagePlan

LAST = "last"
"""Branch that owns the last stage alone, D{K}B1, of a backbone with any number K of stages."""

SECOND_LAST = "last2"
"""Branch that owns the last two stages, D{K-1}B2, of a backbone with any number K of stages."""

PEER = "peer"
"""Second network of the student's structure with fresh weights."""


def is_branch(spec: str) -> bool:
    """Whether an auxiliary learner is a branch of the student rather than a network of its own.

    Args:
        spec: Name of the learner, such as ``D3B1``, ``last``, ``peer`` or ``resnet20``.
    """
    return spec in (LAST, SECOND_LAST) or re.match(r"D\d", spec) is not None


def peer_network(spec: str) -> str:
    """Return the name of a learner that is a network of its own, without the branches that it has itself.

    Args:
        spec: Name of the learner, such as ``peer`` or ``resnet20+D3B1``.

    Examples:
        >>> peer_network("resnet20+D3B1")
        'resnet20'
    """
    return spec.partition("+")[0]


def resolved(spec: str, plan: StagePlan | None) -> str:
    """Return the ``DnBm`` of a branch that is named by its number of stages; any other name as it is.

    Args:
        spec: Name of the learner.
        plan: Stages of the backbone; None where they are unknown.
    """
    generic = (LAST, SECOND_LAST)
    if plan is None or spec not in generic:
        return spec
    names = branch_names(plan)
    place = generic.index(spec)
    return names[place] if place < len(names) else spec


def branch_names(plan: StagePlan) -> tuple[str, ...]:
    """List every ``DnBm`` of a backbone, the shortest branch first.

    Args:
        plan: Stages of the backbone.

    Examples:
        >>> branch_names(StagePlan(("stem", "layer1", "layer2"), "fc"))
        ('D2B1', 'D1B2')
    """
    count = len(plan.features) - 1
    return tuple(f"D{entry}B{count + 1 - entry}" for entry in range(count, 0, -1))


def default_branches(plan: StagePlan) -> tuple[str, ...]:
    """Return the two auxiliary learners of the paper (Table 7): ``D{K}B1`` and ``D{K-1}B2`` for K stages.

    Args:
        plan: Stages of the backbone.
    """
    return branch_names(plan)[:2]


def entry_stage(spec: str, plan: StagePlan, backbone: str = "the backbone") -> int:
    """Return the number n of the stage whose input a branch ``DnBm`` reads, counted from 1.

    The branch owns the m stages from there to the end (Table 7).

    Args:
        spec: Name of the branch, such as ``D3B1``.
        plan: Stages of the backbone.
        backbone: Name of the backbone in the error message.

    Raises:
        ACKDError: If the backbone has no such branch.
    """
    known, spec = branch_names(plan), resolved(spec, plan)
    if spec not in known:
        raise ACKDError(
            f"branch {spec!r} does not fit {backbone}, which has {len(known)} stages; use one of {', '.join(known)}"
        )
    return len(known) - known.index(spec)
