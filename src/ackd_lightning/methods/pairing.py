"""Which stage of the student is compared with which stage of the teacher."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.types import NetSpec


def pair_stages(student: NetSpec, teacher: NetSpec, *, method: str) -> tuple[tuple[int, int], ...]:
    """Pairs (n, m): feature F_n of the student is compared with F_m of the teacher; stems are left out.

    With equally many stages these are (1, 1), (2, 2), ... Otherwise the last stages form a pair, and from there to the
    front every stage of the longer network takes the partner of its successor or the one before that, whichever is
    nearer in resolution (the deeper when both are). So the order is kept and no stage of either network is left out.

    Args:
        student: its shapes.
        teacher: its shapes.
        method: name of the caller, for the message.

    Raises:
        ACKDError: when a network has no stages that are known.
    """
    for role, spec in (("student", student), ("teacher", teacher)):
        if len(spec.features) < 2:
            raise ACKDError(
                f"method {method} compares features and the stages of the {role} are not known; "
                "give the network an attribute `stage_plan`, or choose a method that compares logits, such as KD"
            )
    ours, theirs = len(student.features) - 1, len(teacher.features) - 1
    if ours == theirs:
        return tuple((stage, stage) for stage in range(1, ours + 1))
    longer, shorter = (student, teacher) if ours > theirs else (teacher, student)

    def distance(long: int, short: int) -> float:
        return abs(math.log2(longer.features[long][1] / shorter.features[short][1]))

    last_long, last_short = len(longer.features) - 1, len(shorter.features) - 1
    pairs = [(last_long, last_short)]
    for long in range(last_long - 1, 0, -1):
        successor = pairs[-1][1]
        open_to_it = [short for short in (successor, successor - 1) if 1 <= short <= long]
        pairs.append((long, min(open_to_it, key=lambda short: distance(long, short))))
    pairs.reverse()
    return tuple(pairs if ours > theirs else [(short, long) for long, short in pairs])


def same_size(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the larger of two feature maps to the height and width of the smaller.

    Args:
        first: ``B x C x H x W``.
        second: ``B x D x H' x W'``.

    Returns:
        Both, of equal height and width.
    """
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    return tuple(  # type: ignore[return-value]
        each if tuple(each.shape[2:]) == size else F.adaptive_avg_pool2d(each, size) for each in (first, second)
    )
