"""Functions of tensors that several methods use: losses in float32, weighted logits, and the global batch under DDP."""

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
    r"""Compute the divergence between two softened class distributions, averaged over the batch.

    With \(p = \mathrm{softmax}(z / \tau)\) for each side (Eq. 1 of the ACKD paper):

    * ``forward``: \(\tau^2\,\mathrm{KL}(p^t \| p^s)\), the usual distillation loss (Hinton et al. 2015)
    * ``reverse``: \(\tau^2\,\mathrm{KL}(p^s \| p^t)\), Eq. 2 of the ACKD paper as printed
    * ``js``: \(\tau^2\) times the Jensen-Shannon divergence

    The gradient flows into both arguments, so detach the one that is a target.

    Args:
        student_logits: Logits of the side that learns, ``B x K``.
        teacher_logits: Logits of the side that is learned from, ``B x K``.
        temperature: Temperature tau, above 0.
        direction: Divergence to compute.
        scale_temperature: Multiply by tau squared, so that gradients keep their size when tau changes.

    Returns:
        Scalar float32, in nats.

    Raises:
        ValueError: If ``direction`` is none of the three.

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
    r"""Compute the distillation loss of Hinton et al. (2015): \(\tau^2\,\mathrm{KL}(p^t \| p^s)\), batch mean.

    No gradient flows into the teacher.

    Args:
        student_logits: Logits of the student, ``B x K``.
        teacher_logits: Logits of the teacher, ``B x K``.
        temperature: Temperature tau, above 0.

    Returns:
        Scalar float32, in nats.
    """
    return kl_divergence(student_logits, teacher_logits.detach(), temperature=temperature)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy with the labels in float32, averaged over the batch.

    Args:
        logits: Logits, ``B x K``.
        target: Class indices, ``B`` int64, or the weight of each class, ``B x K`` float (`Batch.labels` is either).

    Returns:
        Scalar float32, in nats.
    """
    return F.cross_entropy(logits.float(), target)


class _Gather(torch.autograd.Function):
    """Gather the shards of all processes; the gradient of a shard is the sum over the processes.

    torch's own differentiable gather is deprecated in 2.15, and 2.6 lacks its successor.
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
    """Gather the global batch of a multi-process run, with gradient, for losses that compare the images of a batch.

    Every process computes the same loss on it. The average of the gradients over the processes, which DDP computes,
    is then the gradient of a single process with the whole batch.

    Args:
        shard: Part of this process, ``B x ...``, of the same shape in every process.

    Returns:
        ``(processes * B) x ...`` in the order of a single process, because samplers deal out images in turn: the first
        images of all processes, then the second ones, and so on. ``shard`` itself in a single process.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return shard
    gathered: Tensor = _Gather.apply(shard.contiguous())
    return gathered


def weighted_logits(weights: Tensor, logits: Sequence[Tensor]) -> Tensor:
    r"""Compute the weighted sum of the learners' logits, \(z = \sum_k a^{(k)} z^{(k)}\) (Eq. 3 of the ACKD paper).

    Args:
        weights: Weight of each of M learners for each image, ``B x M``.
        logits: Logits of each learner, M tensors ``B x K``.

    Returns:
        ``B x K`` float32.
    """
    stacked = torch.stack([each.float() for each in logits], dim=1)
    return (weights.float().unsqueeze(2) * stacked).sum(dim=1)  # no matmul: autocast would round it to half precision
