"""Functions of tensors that several methods use: losses in float32, weighted logits, and the global batch under DDP."""

from __future__ import annotations

import math
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

    Examples:
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> kl_divergence(z, z, temperature=4.0).item()
        0.0
    """
    losses = kl_per_image(
        student_logits,
        teacher_logits,
        temperature=temperature,
        direction=direction,
        scale_temperature=scale_temperature,
    )
    return losses.mean()


def kl_per_image(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    direction: KLDirection = "forward",
    scale_temperature: bool = True,
) -> Tensor:
    """Compute the divergence of every image, of which `kl_divergence` is the mean.

    Args:
        student_logits: Logits of the side that learns, ``B x K``.
        teacher_logits: Logits of the side that is learned from, ``B x K``.
        temperature: Temperature tau, above 0.
        direction: Divergence to compute.
        scale_temperature: Multiply by tau squared, so that gradients keep their size when tau changes.

    Returns:
        ``B`` float32, in nats.

    Raises:
        ValueError: If ``direction`` is none of the three.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
        >>> [round(each, 4) for each in kl_per_image(student, teacher, temperature=1.0).tolist()]
        [0.4338, 0.0]
    """
    log_student = F.log_softmax(student_logits.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    if direction == "forward":
        losses = kl_of_logs(log_student, log_teacher)
    elif direction == "reverse":
        losses = kl_of_logs(log_teacher, log_student)
    elif direction == "js":
        log_mean = torch.logaddexp(log_student, log_teacher) - torch.log(log_student.new_tensor(2.0))
        losses = 0.5 * (kl_of_logs(log_mean, log_student) + kl_of_logs(log_mean, log_teacher))
    else:
        raise ValueError(f"direction is {direction!r}; it must be 'forward', 'reverse' or 'js'")
    return losses * temperature**2 if scale_temperature else losses


def kl_of_logs(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """Compute KL(teacher || student) of every row of two matrices of log-probabilities.

    Args:
        log_student: Log-probabilities ``B x K`` of the side that learns.
        log_teacher: Log-probabilities ``B x K`` of the side that is learned from.

    Returns:
        ``B``, in nats.
    """
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


def target_and_rest(logits: Tensor, target: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    r"""Return log-probabilities of "target or rest" and of the other classes among themselves.

    The target class is removed from the logits, not masked by a large number, so both are exact even when one class
    has all the probability.

    Args:
        logits: Logits ``B x K``, K at least 2.
        target: Classes, ``B`` int64.
        temperature: Temperature tau, above 0.

    Returns:
        \(\log (p_y, 1 - p_y)\), ``B x 2``, and \(\log \hat p\), ``B x (K - 1)``, float32.
    """
    other = torch.arange(logits.shape[1] - 1, device=target.device).expand(target.shape[0], -1)
    other = other + (other >= target[:, None])  # B x (K - 1): every class but the target
    scaled = logits.float() / temperature
    rest = scaled.gather(1, other)
    odds = scaled.gather(1, target[:, None]) - rest.logsumexp(dim=1, keepdim=True)  # log p_y / (1 - p_y)
    return F.logsigmoid(torch.cat([odds, -odds], dim=1)), F.log_softmax(rest, dim=1)


def standardized(logits: Tensor) -> Tensor:
    r"""Standardise the logits of every image (Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024).

    \(z \mapsto (z - \bar z) / \sigma(z)\) with the mean \(\bar z\) and the standard deviation
    \(\sigma(z) = \sqrt{\frac1K \sum_k (z_k - \bar z)^2}\) over the classes. (The authors' released code
    divides by K - 1.) Equal logits for all classes become zeros without gradient.

    Args:
        logits: Logits, ``B x K``.

    Returns:
        ``B x K`` float32; rows have mean 0 and variance 1.

    Examples:
        >>> standardized(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    logits = logits.float()
    centred = logits - logits.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    varies = variance.sqrt() > 1e-6 * logits.abs().amax(dim=1, keepdim=True)  # more than float32's rounding
    return torch.where(varies, centred, 0.0) * torch.where(varies, variance, 1.0).rsqrt()


def entropy(logits: Tensor, *, temperature: float) -> Tensor:
    """Compute the entropy of the softened prediction of every image.

    Args:
        logits: Logits, ``B x K``.
        temperature: Temperature tau, above 0.

    Returns:
        ``B`` float32 from 0 to log K, in nats.

    Examples:
        >>> entropy(torch.tensor([[0.0, 0.0], [0.0, 3.0]]), temperature=1.0)
        tensor([0.6931, 0.1909])
    """
    log_probability = F.log_softmax(logits.float() / temperature, dim=1)
    return -(log_probability.exp() * log_probability).sum(dim=1)


@torch.no_grad()
def entropy_weights(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Weigh every image by the entropies of both predictions (Su et al.: EA-KD, ICCV 2025).

    \(w = \frac12 \left(H^t + H^t H^s / \log K\right)\) with the entropies \(H\) of \(\mathrm{softmax}(z / \tau)\). (The
    authors' released code divides by log K for ImageNet, but by 100 for CIFAR-100.)

    Args:
        student_logits: Logits of the student, ``B x K``.
        teacher_logits: Logits of the teacher, ``B x K``.
        temperature: Temperature tau of the entropies, above 0.

    Returns:
        ``B`` float32 from 0 to log K, without gradient.

    Examples:
        >>> entropy_weights(torch.zeros(1, 2), torch.tensor([[0.0, 3.0]]), temperature=3.0)
        tensor([0.5822])
    """
    teacher, student = (entropy(each, temperature=temperature) for each in (teacher_logits, student_logits))
    return teacher * (1 + student / math.log(student_logits.shape[1])) / 2


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


def correlation(first: Tensor, second: Tensor, *, dim: int) -> Tensor:
    """Compute Pearson's correlation along one axis of two matrices; 0 without gradient where one of them is constant.

    Args:
        first: Matrix.
        second: Matrix of the same shape.
        dim: Axis along which the values are compared.

    Returns:
        Vector along the other axis, from -1 to 1.

    Examples:
        >>> first, second = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]), torch.tensor([[6.0, 4.0, 2.0]] * 2)
        >>> [round(each, 4) for each in correlation(first, second, dim=1).tolist()]
        [-1.0, 0.0]
    """

    def centred(values: Tensor) -> Tensor:
        centre = values - values.mean(dim=dim, keepdim=True)
        size = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
        varies = torch.linalg.vector_norm(centre, dim=dim, keepdim=True) > 1e-6 * size  # more than float32's rounding
        return torch.where(varies, centre, 0.0)

    first, second = centred(first), centred(second)
    norms = torch.linalg.vector_norm(first, dim=dim) * torch.linalg.vector_norm(second, dim=dim)
    result: Tensor = (first * second).sum(dim=dim) / (norms + 1e-8)
    return result


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


def mean_log_probability(logits: Sequence[Tensor]) -> Tensor:
    r"""Return the logarithm of the classifiers' mean prediction, \(\log \bar p\).

    Args:
        logits: Logits ``B x K`` of each of n classifiers.

    Returns:
        ``B x K`` float32.
    """
    every = torch.stack([F.log_softmax(each.float(), dim=1) for each in logits])
    return every.logsumexp(dim=0) - math.log(len(logits))


def shrunk(feature: Tensor, height: int, width: int) -> Tensor:
    """Pool a feature map to a height and a width where those are smaller than its own.

    Args:
        feature: Feature map ``B x C x H x W``.
        height: Largest height of the result.
        width: Largest width of the result.
    """
    size = (min(feature.shape[2], height), min(feature.shape[3], width))
    return feature if tuple(feature.shape[2:]) == size else F.adaptive_avg_pool2d(feature, size)


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
