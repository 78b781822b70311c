"""What the methods share in which the student and its peers learn from one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import kd_loss
from ackd_lightning.models.branches import is_branch
from ackd_lightning.types import NetOutput


def require_networks(names: Sequence[str], argument: str, method: str) -> tuple[str, ...]:
    """Return the names of peers, each of which must be a whole network.

    Args:
        names: ``peer`` or model names.
        argument: Argument of the method that has them, for the message.
        method: Name of the method, for the message.

    Raises:
        ACKDError: If there is none, or one is a branch of the student.
    """
    if not names:
        raise ACKDError(f"{argument} is empty in method {method}; name at least one, such as ['peer']")
    for name in names:
        if is_branch(name):
            raise ACKDError(
                f"{argument} names {name!r} in method {method}, a branch of the student; name whole networks, such as "
                "peer"
            )
    return tuple(names)


def all_logits(student: NetOutput) -> list[Tensor]:
    """Return the logits ``B x K`` of all learners, the student's first.

    Args:
        student: Output of the student with its auxiliary learners.
    """
    return [student.logits, *(branch.logits for branch in student.branches)]


def mutual_loss(logits: Sequence[Tensor], *, temperature: float) -> Tensor:
    r"""Return the distillation among n networks that learn from one another.

    \(\sum_i \frac{\tau^2}{n - 1} \sum_{j \ne i} \mathrm{KL}(p_j \| p_i)\), mean over the batch; no gradient flows into
    the \(p_j\).

    Args:
        logits: Logits ``B x K`` of each of n >= 2 networks.
        temperature: Temperature tau, above 0.

    Returns:
        Scalar float32, in nats.

    Examples:
        >>> mutual_loss([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])], temperature=1.0)
        tensor(0.7616)
    """
    pairs = [
        kd_loss(own, other, temperature=temperature)
        for i, own in enumerate(logits)
        for j, other in enumerate(logits)
        if i != j
    ]
    return torch.stack(pairs).sum() / (len(logits) - 1)
