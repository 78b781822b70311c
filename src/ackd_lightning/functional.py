"""Pure losses that two or more methods use: tensors in, scalar out, computed in float32 log space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

KLDirection = Literal["forward", "reverse", "js"]


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    direction: KLDirection = "forward",
    scale_temperature: bool = True,
) -> Tensor:
    r"""Divergence between two softened class distributions, mean over the batch.

    With \(p = \mathrm{softmax}(z / \tau)\) of each side (Eq. 1 of the ACKD paper):

    * ``forward``: \(\tau^2\,\mathrm{KL}(p^t \| p^s)\), the usual distillation loss (Hinton et al. 2015)
    * ``reverse``: \(\tau^2\,\mathrm{KL}(p^s \| p^t)\), Eq. 2 of the ACKD paper as printed
    * ``js``: \(\tau^2\) times the Jensen-Shannon divergence

    The gradient flows into both arguments: detach the one that is a target.

    Args:
        student_logits: ``B x K``, the side that learns.
        teacher_logits: ``B x K``, the side that is learnt from.
        temperature: tau, > 0.
        direction: which divergence.
        scale_temperature: multiply by tau squared, so that gradients keep their size when tau changes.

    Returns:
        Scalar float32, in nats.

    Raises:
        ValueError: when ``direction`` is none of the three.

    Example:
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> kl_divergence(z, z, temperature=4.0).item()
        0.0
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    if direction == "forward":
        loss = kl(log_teacher, log_student)
    elif direction == "reverse":
        loss = kl(log_student, log_teacher)
    elif direction == "js":
        log_mean = torch.logaddexp(log_student, log_teacher) - torch.log(log_student.new_tensor(2.0))
        loss = 0.5 * (kl(log_student, log_mean) + kl(log_teacher, log_mean))
    else:
        raise ValueError(f"direction is {direction!r}; it must be 'forward', 'reverse' or 'js'")
    return loss * temperature**2 if scale_temperature else loss


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Knowledge distillation of Hinton et al. (2015): \(\tau^2\,\mathrm{KL}(p^t \| p^s)\), mean over the batch.

    No gradient flows into the teacher.

    Args:
        student_logits: ``B x K``.
        teacher_logits: ``B x K``.
        temperature: tau, > 0.

    Returns:
        Scalar float32, in nats.
    """
    return kl_divergence(student_logits, teacher_logits.detach(), temperature=temperature)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with hard labels in float32, mean over the batch.

    Args:
        logits: ``B x K``.
        target: ``B`` int64.

    Returns:
        Scalar float32, in nats.
    """
    return F.cross_entropy(logits.float(), target)


class _Gather(torch.autograd.Function):
    """All processes' shards; a shard's gradient is the sum of what every process sends back.

    torch's own differentiable gathering is deprecated in 2.15 in favour of one that 2.6 lacks.
    """

    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard)
        return torch.stack(shards, dim=1).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        own: Tensor = total.unflatten(0, (-1, dist.get_world_size()))[:, dist.get_rank()]  # type: ignore[no-untyped-call]
        return own


def whole_batch(shard: Tensor) -> Tensor:
    """The global batch of a multi-process run, with gradient, for losses that compare the images of a batch.

    Every process computes the same loss on it; the mean of the processes' gradients, which DDP takes, is then the
    gradient of one process with the whole batch.

    Args:
        shard: ``B x ...``, this process's part, of the same size everywhere.

    Returns:
        ``(processes * B) x ...`` in the order that one process would have, since samplers deal images out in turn:
        first images of all processes, then second ones, and so on. ``shard`` itself in a single process.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return shard
    gathered: Tensor = _Gather.apply(shard.contiguous())
    return gathered


def weighted_logits(weights: Tensor, logits: Sequence[Tensor]) -> Tensor:
    r"""Logits of the learning group, \(z = \sum_k a^{(k)} z^{(k)}\) (Eq. 3).

    Args:
        weights: ``B x M``.
        logits: M tensors ``B x K``.

    Returns:
        ``B x K`` float32.
    """
    stacked = torch.stack([each.float() for each in logits], dim=1)
    return (weights.float().unsqueeze(2) * stacked).sum(dim=1)  # no matmul: autocast would round it to half precision
