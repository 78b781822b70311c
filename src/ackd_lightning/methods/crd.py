r"""CRD. Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020 (arXiv:1910.10699).

Both networks' pooled embeddings go through a linear head to the unit sphere, \(e^s\) and \(e^t\). Two memories keep
running embeddings of all N training images, \(m^s\) and \(m^t\). An embedding shall be close to the other network's
memory of the same image and far from its memories of K images of other classes (noise-contrastive estimation):

\(h(e, m) = \exp(e \cdot m / \tau) / Z,\quad c = K / N\)

\(L(e, m) = -\frac{1}{B} \sum_b \Big[ \log \frac{h(e_b, m_b)}{h(e_b, m_b) + c}
+ \sum_{k=1}^{K} \log \frac{c}{h(e_b, m_{n_{bk}}) + c} \Big]\)

\(L = w_{ce}\,\mathrm{CE} + w_{kd}\,L_{KD} + w_{crd}\,[L(e^s, m^t) + L(e^t, m^s)]\)

Each Z is N times the mean of \(\exp(e \cdot m / \tau)\) over the first batch and stays. After every step the rows of
the batch are moved, \(m \leftarrow \mathrm{norm}(\mu m + (1 - \mu) e)\).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss, whole_batch
from ackd_lightning.methods.base import FitInfo, Method, Networks, embedding_of
from ackd_lightning.methods.crd_negatives import NegativeSampler
from ackd_lightning.models.features import require_embedding
from ackd_lightning.random import mix
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive, PositiveInt, Range

_STREAM = 0x435244  # keeps the draws apart from others with equal keys
_DENSE = 64
"""Up to so many images per sample it is faster, and smaller, to score all rows than to gather those of the samples."""


def contrast_scores(embedding: Tensor, memory: Tensor, samples: Tensor, *, temperature: float) -> Tensor:
    r"""Scaled similarities \(e_b \cdot m_{n_{bk}} / \tau\) of each image with its samples.

    The gradient flows into the embedding, not into the memory.

    Args:
        embedding: ``B x D`` of unit length.
        memory: ``N x D``.
        samples: ``B x (1 + K)`` int64 rows of the memory: the image itself, then its negatives.
        temperature: tau, > 0.

    Returns:
        ``B x (1 + K)`` float32.
    """
    embedding, memory = embedding.float() / temperature, memory.detach().float()
    with torch.autocast(embedding.device.type, enabled=False):
        if memory.shape[0] <= _DENSE * samples.shape[1]:
            return (embedding @ memory.T).gather(1, samples)
        return torch.bmm(memory[samples], embedding[:, :, None])[:, :, 0]


def normaliser(scores: Tensor, *, rows: int) -> Tensor:
    """Estimate of the constant Z: N times the mean exponential of the scores, without gradient.

    Args:
        scores: ``B x (1 + K)``, from ``contrast_scores``.
        rows: N.

    Returns:
        Scalar float32.
    """
    flat = scores.detach().float().flatten()
    return (torch.logsumexp(flat, dim=0) + math.log(rows / flat.numel())).exp()


def nce_loss(scores: Tensor, *, normaliser: Tensor | float, rows: int) -> Tensor:
    """Noise-contrastive estimation of one direction, L of this module's equations, in log space.

    Args:
        scores: ``B x (1 + K)``, the positive first; with gradient.
        normaliser: Z, > 0.
        rows: N.

    Returns:
        Scalar float32 in nats, summed over the samples and averaged over the batch.
    """
    scores = scores.float()
    odds = scores - torch.as_tensor(normaliser, device=scores.device).float().log()
    odds = odds - math.log((scores.shape[1] - 1) / rows)
    return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(dim=1)).mean()


def _contrast(
    embedding: Tensor, memory: Tensor, samples: Tensor, temperature: float, normaliser: Tensor | float
) -> Tensor:
    """One direction of the loss."""
    with torch.autocast(embedding.device.type, enabled=False):
        scores = contrast_scores(embedding, memory, samples, temperature=temperature)
        return nce_loss(scores, normaliser=normaliser, rows=memory.shape[0])


class _Contrast(torch.autograd.Function):
    """One direction of the loss, whose gradient is computed at once, while the memory is as it was.

    So nothing of the size of the memory or of the samples is kept for the backward pass, and the memory's rows may
    move before it.
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
    """Contrastive loss of CRD: the student against the teacher's memory, plus the reverse.

    The gradient flows into both embeddings (the teacher's head learns, too), not into the memories. It is computed
    at once, so the memories may be changed before the backward pass; there is no second derivative.

    Args:
        student_embedding: ``B x D`` of unit length.
        teacher_embedding: ``B x D`` of unit length.
        student_memory: ``N x D``.
        teacher_memory: ``N x D``.
        samples: ``B x (1 + K)`` int64 rows of the memories: the image itself, then images of other classes.
        temperature: tau, > 0.
        student_normaliser: Z of the scores of the student's embeddings, > 0.
        teacher_normaliser: Z of the teacher's, > 0.

    Returns:
        Scalar float32 in nats, averaged over the batch.
    """
    learns = torch.is_grad_enabled() and (student_embedding.requires_grad or teacher_embedding.requires_grad)
    contrast = _Contrast.apply if learns else _contrast
    ours: Tensor = contrast(student_embedding, teacher_memory, samples, temperature, student_normaliser)
    theirs: Tensor = contrast(teacher_embedding, student_memory, samples, temperature, teacher_normaliser)
    return ours + theirs


def moved_rows(memory: Tensor, index: Tensor, embedding: Tensor, *, momentum: float) -> Tensor:
    """New rows of a memory; an image that stands in the batch twice gets its last embedding both times.

    Args:
        memory: ``N x D``.
        index: ``B`` int64.
        embedding: ``B x D`` of unit length.
        momentum: share of the old row.

    Returns:
        ``B x D`` of unit length, in the memory's type.
    """
    places = torch.arange(len(index), device=index.device)
    last = torch.where(index[:, None] == index[None, :], places, -1).amax(dim=1)
    rows = momentum * memory[index].float() + (1 - momentum) * embedding.float()[last]
    return unit(rows).to(memory.dtype)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays.

    Args:
        rows: ``B x D``.
    """
    return F.normalize(rows, dim=1, eps=1e-6)


class CRD(Method):
    """Cross-entropy plus contrastive representation distillation, and plain distillation when it is given a weight.

    It knows every training image by its ``Batch.index``: ``begin_fit`` makes one row for each in two memories, which
    are part of a checkpoint. Negatives are images of other classes, drawn with replacement by a hash of (seed, step,
    image, position), so they depend neither on the device nor on the number of processes. (The benchmark draws without
    replacement where there are enough images; K = 16384 of 50,000.) In a multi-process run every process keeps the
    same memories, moved by the whole batch.

    Indices are checked in the first step only, since a check waits for the GPU.

    Args:
        embedding_size: D, width of both heads.
        negatives: K.
        temperature: tau of the contrast, > 0.
        momentum: mu, share of a memory's old row, in [0, 1).
        kd_temperature: tau of the distillation term, > 0.
        weight_ce: weight of the cross-entropy.
        weight_kd: weight of the distillation term; the paper's CRD+KD has 1.
        weight_crd: weight of the contrastive term.

    Raises:
        ACKDError: for arguments out of range.
    """

    replicated_buffers = (
        *("memory_student", "memory_teacher"),
        *(f"sampler.{name}" for name in NegativeSampler.TABLES),
    )
    compile_modules = ("sampler",)

    def __init__(
        self,
        *,
        embedding_size: PositiveInt = 128,
        negatives: PositiveInt = 16384,
        temperature: Positive = 0.07,
        momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.5,
        kd_temperature: Positive = 4.0,
        weight_ce: NonNegative = 1.0,
        weight_kd: NonNegative = 0.0,
        weight_crd: NonNegative = 0.8,
    ) -> None:
        super().__init__()
        self.embedding_size = embedding_size
        self.temperature, self.momentum, self.kd_temperature = temperature, momentum, kd_temperature
        self.loss_weights = {"ce": weight_ce, "kd": weight_kd, "crd": weight_crd}
        self.memory_student: Tensor
        self.memory_teacher: Tensor
        self.normalisers: Tensor
        self.steps: Tensor
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, torch.zeros(0, embedding_size))
        self.register_buffer("normalisers", torch.full((2,), -1.0))  # of the student's and the teacher's scores
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.sampler = NegativeSampler(negatives, stream=_STREAM)
        self._first_step = True

    def build(self, networks: Networks) -> None:
        """Make both heads.

        Args:
            networks: Shapes and structures of student and teachers.

        Raises:
            ACKDError: when an embedding is not known.
        """
        student, teacher = networks.student, networks.teacher
        ours = require_embedding(student, "the student", "method CRD")
        theirs = require_embedding(teacher, "the teacher", "method CRD")
        self.head_student = nn.Linear(ours, self.embedding_size)
        self.head_teacher = nn.Linear(theirs, self.embedding_size)

    # ---------------------------------------------------------------- memories

    def begin_fit(self, fit: FitInfo) -> None:
        """Create both memories and the tables of the classes; keep memories for as many images.

        Args:
            fit: Its targets and its seed are read.

        Raises:
            ACKDError: for images of fewer than two classes, which have no negatives.
        """
        targets, seed = fit.required_targets(self), fit.seed
        self.sampler.set_targets(targets, seed)
        if len(self.memory_student) != len(targets):
            generator = torch.Generator().manual_seed(mix(_STREAM, seed))  # equal in all processes
            bound = 1 / math.sqrt(self.embedding_size / 3)
            for name in ("memory_student", "memory_teacher"):
                rows = torch.empty(len(targets), self.embedding_size).uniform_(-bound, bound, generator=generator)
                setattr(self, name, rows.to(self.steps.device))
            self.normalisers.fill_(-1.0)
            self.steps.zero_()
        self._first_step = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the number of images from the checkpoint: without a fit nobody else knows it."""
        stored = state_dict.get(f"{prefix}memory_student")
        if isinstance(stored, Tensor) and len(stored) != len(self.memory_student):
            if known := len(self.sampler.targets):
                raise ACKDError(
                    f"the checkpoint keeps {len(stored)} training images for method CRD and the data have "
                    f"{known}; go on with the data that it was trained on"
                )
            for name in ("memory_student", "memory_teacher"):
                setattr(self, name, getattr(self, name).new_zeros(len(stored), self.embedding_size))
        self._first_step = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(self, batch: Batch) -> None:
        targets = self.sampler.targets
        if not len(targets):
            raise ACKDError("method CRD does not know the training images yet; call begin_fit with their targets")
        low, high, rows = int(batch.index.min()), int(batch.index.max()), len(targets)
        if low < 0 or high >= rows:
            raise ACKDError(
                f"batch.index goes from {low} to {high} and method CRD keeps {rows} training images; the data must "
                "give (image, target, index) with the image's position in the training set"
            )
        if not torch.equal(targets[batch.index], batch.target):
            raise ACKDError(
                "batch.index does not fit batch.target in method CRD: the class of an image differs from the one that "
                "`train_targets` has for its index; both must count the same training set"
            )

    # ---------------------------------------------------------------- loss

    def _embed(self, student: NetOutput, teacher: NetOutput) -> tuple[Tensor, Tensor]:
        """Unit embeddings ``B x D`` of both, in float32 under mixed precision, too."""
        device = student.logits.device.type
        with torch.autocast(device, enabled=False):
            ours, theirs = (
                unit(F.linear(each.float(), head.weight.float(), head.bias.float()))
                for each, head in (
                    (embedding_of(student), self.head_student),
                    (embedding_of(teacher).detach(), self.head_teacher),
                )
            )
        return ours, theirs

    def _samples(self, batch: Batch) -> Tensor:
        """Every image itself, then its negatives."""
        negatives: Tensor = self.sampler(batch.index, batch.target, self.steps)
        return torch.cat([batch.index[:, None], negatives], dim=1)

    @torch.no_grad()
    def _normalisers(self, student: Tensor, teacher: Tensor, samples: Tensor) -> Tensor:
        """Both Z: those of the first step; before it, of this batch over all processes."""
        if not self._first_step or bool((self.normalisers > 0).all()):
            return self.normalisers.float()
        rows = len(self.memory_student)
        scores = (
            contrast_scores(student, self.memory_teacher, samples, temperature=self.temperature),
            contrast_scores(teacher, self.memory_student, samples, temperature=self.temperature),
        )
        return whole_batch(torch.stack([normaliser(each, rows=rows) for each in scores])[None]).mean(dim=0)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Terms ``ce``, ``kd`` and ``crd``; arguments as in the base class.

        Raises:
            ACKDError: when ``begin_fit`` was not called, or indices do not fit.
        """
        assert teacher is not None
        if self._first_step:
            self._check(batch)
        embeddings, samples = self._embed(student, teacher), self._samples(batch)
        constants = self._normalisers(*embeddings, samples)
        contrast = crd_loss(
            *embeddings,
            self.memory_student,
            self.memory_teacher,
            samples,
            temperature=self.temperature,
            student_normaliser=constants[0],
            teacher_normaliser=constants[1],
        )
        return {
            "ce": cross_entropy(student.logits, batch.target),
            "kd": kd_loss(student.logits, teacher.logits, temperature=self.kd_temperature),
            "crd": contrast,
        }

    @torch.no_grad()
    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Keep Z of the first step, move the rows of the whole batch, count the step; arguments as in the base class.

        Args:
            student: the outputs that ``forward`` had.
            teacher: as there.
            batch: as there.
        """
        assert teacher is not None
        embeddings = self._embed(student, teacher)
        if self._first_step:
            self._check(batch)
            self.normalisers.copy_(self._normalisers(*embeddings, self._samples(batch)))
            self._first_step = False
        index = whole_batch(batch.index)
        for memory, embedding in zip((self.memory_student, self.memory_teacher), embeddings, strict=True):
            memory[index] = moved_rows(memory, index, whole_batch(embedding), momentum=self.momentum)
        self.steps += 1
