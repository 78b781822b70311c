"""Contrastive loss of CRD between embeddings and memories, and how a memory moves."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ackd_lightning.methods.rows import last_of

_DENSE = 64
"""Largest number of images per sample for which it is faster, and smaller, to score all rows than to gather some."""


def contrast_scores(embedding: Tensor, memory: Tensor, samples: Tensor, *, temperature: float) -> Tensor:
    r"""Return the scaled similarities \(e_b \cdot m_{n_{bk}} / \tau\) of each image with its samples.

    Gradients flow into the embedding, not into the memory.

    Args:
        embedding: Unit vectors ``B x D``.
        memory: Embeddings ``N x D`` of all images.
        samples: Rows of the memory, ``B x (1 + K)`` int64: the image itself, then its negatives.
        temperature: Temperature tau, above 0.

    Returns:
        ``B x (1 + K)`` float32.
    """
    embedding, memory = embedding.float() / temperature, memory.detach().float()
    with torch.autocast(embedding.device.type, enabled=False):
        if memory.shape[0] <= _DENSE * samples.shape[1]:
            return (embedding @ memory.T).gather(1, samples)
        return torch.bmm(memory[samples], embedding[:, :, None])[:, :, 0]


def normaliser(scores: Tensor, *, rows: int) -> Tensor:
    """Return an estimate of the constant Z: N times the mean exponential of the scores, without gradient.

    Args:
        scores: Similarities ``B x (1 + K)`` of ``contrast_scores``.
        rows: Number N of images.

    Returns:
        Scalar float32.
    """
    flat = scores.detach().float().flatten()
    return (torch.logsumexp(flat, dim=0) + math.log(rows / flat.numel())).exp()


def nce_loss(scores: Tensor, *, normaliser: Tensor | float, rows: int) -> Tensor:
    """Return the noise-contrastive estimation of one direction, L of the equations, computed in log space.

    Args:
        scores: Similarities ``B x (1 + K)``, the positive first; gradients flow into them.
        normaliser: Constant Z, above 0.
        rows: Number N of images.

    Returns:
        Scalar float32 in nats, summed over the samples and averaged over the batch.

    Examples:
        >>> nce_loss(torch.zeros(1, 3), normaliser=1.0, rows=2)  # h = c = 1: three times log 2
        tensor(2.0794)
    """
    scores = scores.float()
    odds = scores - torch.as_tensor(normaliser, device=scores.device).float().log()
    odds = odds - math.log((scores.shape[1] - 1) / rows)
    return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(dim=1)).mean()


def _contrast(
    embedding: Tensor, memory: Tensor, samples: Tensor, temperature: float, normaliser: Tensor | float
) -> Tensor:
    """Return one direction of the loss."""
    with torch.autocast(embedding.device.type, enabled=False):
        scores = contrast_scores(embedding, memory, samples, temperature=temperature)
        return nce_loss(scores, normaliser=normaliser, rows=memory.shape[0])


class _Contrast(torch.autograd.Function):
    """One direction of the loss, with the gradient computed in the forward pass.

    Nothing of the size of the memory or the samples is kept for the backward pass, and the memory may change before it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embedding: Tensor,
        memory: Tensor,
        samples: Tensor,
        temperature: float,
        normaliser: Tensor | float,
    ) -> Tensor:
        with torch.enable_grad():
            own = embedding.detach().float().requires_grad_()
            loss = _contrast(own, memory, samples, temperature, normaliser)
            ctx.save_for_backward(*torch.autograd.grad(loss, own))
        ctx.dtype = embedding.dtype
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return (gradient * own).to(ctx.dtype), None, None, None, None


def crd_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_memory: Tensor,
    teacher_memory: Tensor,
    samples: Tensor,
    *,
    temperature: float,
    student_normaliser: Tensor | float,
    teacher_normaliser: Tensor | float,
) -> Tensor:
    """Return the contrastive loss of CRD: the student against the teacher's memory, plus the reverse.

    Gradients flow into both embeddings (the teacher's head is trained as well), not into the memories. They are
    computed in the forward pass, so the memories may change before the backward pass; there is no second derivative.

    Args:
        student_embedding: Unit vectors ``B x D`` of the student.
        teacher_embedding: Unit vectors ``B x D`` of the teacher.
        student_memory: Embeddings ``N x D`` of all images by the student.
        teacher_memory: Embeddings ``N x D`` of all images by the teacher.
        samples: Rows of the memories, ``B x (1 + K)`` int64: the image itself, then images of other classes.
        temperature: Temperature tau, above 0.
        student_normaliser: Constant Z for the scores of the student's embeddings, above 0.
        teacher_normaliser: Constant Z for the scores of the teacher's embeddings, above 0.

    Returns:
        Scalar float32 in nats, averaged over the batch.
    """
    learns = torch.is_grad_enabled() and (student_embedding.requires_grad or teacher_embedding.requires_grad)
    contrast = _Contrast.apply if learns else _contrast
    ours: Tensor = contrast(student_embedding, teacher_memory, samples, temperature, student_normaliser)
    theirs: Tensor = contrast(teacher_embedding, student_memory, samples, temperature, teacher_normaliser)
    return ours + theirs


def moved_rows(memory: Tensor, index: Tensor, embedding: Tensor, *, momentum: float) -> Tensor:
    """Return the new rows of a memory; an image that is in the batch twice gets its last embedding both times.

    Args:
        memory: Embeddings ``N x D`` of all images.
        index: Rows to move, ``B`` int64.
        embedding: Unit vectors ``B x D`` of the batch.
        momentum: Share of the old row.

    Returns:
        Unit vectors ``B x D`` in the type of the memory.
    """
    rows = momentum * memory[index].float() + (1 - momentum) * embedding.float()[last_of(index)]
    return unit(rows).to(memory.dtype)


def unit(rows: Tensor) -> Tensor:
    """Return rows of length 1; a row of zeros is not changed.

    Args:
        rows: Vectors ``B x D``.

    Examples:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    return F.normalize(rows, dim=1, eps=1e-6)
