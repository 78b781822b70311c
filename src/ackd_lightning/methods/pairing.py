"""Pairs of stages of student and teacher that are compared, and a regressor between two."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ackd_lightning.functional import shrunk
from ackd_lightning.methods.base import features_of
from ackd_lightning.models.features import require_stages
from ackd_lightning.types import NetOutput, NetSpec


def pair_stages(student: NetSpec, teacher: NetSpec, *, method: str) -> tuple[tuple[int, int], ...]:
    """Return pairs (n, m) of a feature F_n of the student and F_m of the teacher, without the stems.

    With equally many stages these are (1, 1), (2, 2), ... Otherwise the last stages form a pair. From there towards the
    input, every stage of the longer network is paired with the partner of the next stage or with the stage before that
    partner, whichever is closer in resolution (the deeper if both are). The order is kept, and no stage is left out.

    Args:
        student: Shapes of the student.
        teacher: Shapes of the teacher.
        method: Name of the method, for the message.

    Raises:
        ACKDError: If the stages of a network are unknown.

    Examples:
        >>> student = NetSpec(10, ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)))
        >>> teacher = NetSpec(10, ((16, 32, 32), (32, 16, 16), (64, 8, 8)))
        >>> pair_stages(student, teacher, method="AT")
        ((1, 1), (2, 1), (3, 2))
    """
    our_shapes = require_stages(student, "the student", f"method {method}")
    their_shapes = require_stages(teacher, "the teacher", f"method {method}")
    ours, theirs = len(our_shapes) - 1, len(their_shapes) - 1
    if ours == theirs:
        return tuple((stage, stage) for stage in range(1, ours + 1))
    longer, shorter = (our_shapes, their_shapes) if ours > theirs else (their_shapes, our_shapes)

    def distance(long: int, short: int) -> float:
        return abs(math.log2(longer[long][1] / shorter[short][1]))

    last_long, last_short = len(longer) - 1, len(shorter) - 1
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
        first: Feature map ``B x C x H x W``.
        second: Feature map ``B x D x H' x W'``.

    Returns:
        Both maps, with equal height and width.
    """
    return shrunk(first, *second.shape[2:]), shrunk(second, *first.shape[2:])


def layer_shapes(
    layers: Sequence[tuple[int, int]], student: NetSpec, teacher: NetSpec
) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Return the shapes ``(C, H, W)`` of every pair of stages.

    Args:
        layers: Pairs as `pair_stages` returns them.
        student: Shapes of the student.
        teacher: Shapes of the teacher.
    """
    assert student.features is not None
    assert teacher.features is not None
    return [(student.features[ours], teacher.features[theirs]) for ours, theirs in layers]


def layer_features(
    layers: Sequence[tuple[int, int]], student: NetOutput, teacher: NetOutput
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the student's features and the teacher's features of every pair of stages.

    Args:
        layers: Pairs as `pair_stages` returns them.
        student: Output of the student.
        teacher: Output of the teacher.
    """
    ours, theirs = features_of(student), features_of(teacher)
    return [ours[stage] for stage, _ in layers], [theirs[stage] for _, stage in layers]


def regressor(channels: int, out_channels: int) -> nn.Sequential:
    """Create a 1x1 convolution, BatchNorm and ReLU from one number of channels to another.

    BatchNorm has no running statistics, since a regressor is never evaluated.

    Args:
        channels: Channels of the student's feature map.
        out_channels: Channels of the teacher's feature map.
    """
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels, track_running_stats=False),
        nn.ReLU(),
    )
