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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss, whole_batch
from ackd_lightning.keyed import keyed_bits, mix
from ackd_lightning.methods.base import Method
from ackd_lightning.types import Batch, NetOutput, NetSpec

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
    embedding, memory = embedding.float(), memory.detach().float()
    with torch.autocast(embedding.device.type, enabled=False):
        # Both save a copy of the memory for the backward pass, because rows move before it.
        if memory.shape[0] <= _DENSE * samples.shape[1]:
            return (embedding @ (memory / temperature).T).gather(1, samples)
        return torch.bmm(memory[samples], embedding[:, :, None] / temperature)[:, :, 0]


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

    The gradient flows into both embeddings (the teacher's head learns, too), not into the memories.

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
    rows = teacher_memory.shape[0]
    ours = contrast_scores(student_embedding, teacher_memory, samples, temperature=temperature)
    theirs = contrast_scores(teacher_embedding, student_memory, samples, temperature=temperature)
    return nce_loss(ours, normaliser=student_normaliser, rows=rows) + nce_loss(
        theirs, normaliser=teacher_normaliser, rows=rows
    )


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

    It knows every training image by its ``Batch.index``: ``set_targets`` makes one row for each in two memories, which
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

    needs_targets = True
    equal_buffers = ("memory_student", "memory_teacher")

    def __init__(
        self,
        *,
        embedding_size: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        kd_temperature: float = 4.0,
        weight_ce: float = 1.0,
        weight_kd: float = 0.0,
        weight_crd: float = 0.8,
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("kd_temperature", kd_temperature)):
            if value <= 0:
                raise ACKDError(f"{name} is {value} in method CRD; it must be above 0")
        for name, count in (("embedding_size", embedding_size), ("negatives", negatives)):
            if count < 1:
                raise ACKDError(f"{name} is {count} in method CRD; it must be 1 or more")
        if not 0 <= momentum < 1:
            raise ACKDError(f"momentum is {momentum} in method CRD; it must be 0 or more and below 1")
        self.embedding_size, self.negatives = embedding_size, negatives
        self.temperature, self.momentum, self.kd_temperature = temperature, momentum, kd_temperature
        self.weight_ce, self.weight_kd, self.weight_crd = weight_ce, weight_kd, weight_crd
        self.memory_student: Tensor
        self.memory_teacher: Tensor
        self.normalisers: Tensor
        self.steps: Tensor
        self.by_class: Tensor
        self.class_start: Tensor
        self.class_count: Tensor
        self.targets: Tensor
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, torch.zeros(0, embedding_size))
        self.register_buffer("normalisers", torch.full((2,), -1.0))  # of the student's and the teacher's scores
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name in ("by_class", "class_start", "class_count", "targets"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        self._first_step, self.seed = True, 0

    def build(self, student: NetSpec, teacher: NetSpec | None) -> None:
        """Make both heads.

        Args:
            student: its embedding is compared.
            teacher: as the student.

        Raises:
            ACKDError: when an embedding is not known.
        """
        assert teacher is not None
        for role, spec in (("student", student), ("teacher", teacher)):
            if not spec.embedding:
                raise ACKDError(
                    f"method CRD compares embeddings and that of the {role} is not known; give the network an "
                    "attribute `stage_plan`, or choose a method that compares logits, such as KD"
                )
        self.head_student = nn.Linear(student.embedding, self.embedding_size)
        self.head_teacher = nn.Linear(teacher.embedding, self.embedding_size)

    # ---------------------------------------------------------------- memories

    def set_targets(self, targets: Tensor, seed: int = 0) -> None:
        """Make both memories and the tables of the classes; memories for as many images as these are kept.

        Args:
            targets: ``N`` int64 by ``Batch.index``.
            seed: of the memories and of the negatives.

        Raises:
            ACKDError: for images of fewer than two classes, which have no negatives.
        """
        device, self.seed = self.steps.device, seed
        targets = targets.to("cpu", torch.int64)
        counts = torch.bincount(targets)
        if int((counts > 0).sum()) < 2:
            raise ACKDError(
                f"all {len(targets)} training images are of one class, and method CRD contrasts images of different "
                "classes; train on two classes or more"
            )
        self.targets, self.class_count = targets.to(device), counts.to(device)
        self.by_class = targets.argsort(stable=True).to(device)
        self.class_start = (counts.cumsum(0) - counts).to(device)
        if len(self.memory_student) != len(targets):
            generator = torch.Generator().manual_seed(mix(_STREAM, seed))  # equal in all processes
            bound = 1 / math.sqrt(self.embedding_size / 3)
            for name in ("memory_student", "memory_teacher"):
                rows = torch.empty(len(targets), self.embedding_size).uniform_(-bound, bound, generator=generator)
                setattr(self, name, rows.to(device))
            self.normalisers.fill_(-1.0)
            self.steps.zero_()
        self._first_step = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the number of images from the checkpoint: without a fit nobody else knows it."""
        stored = state_dict.get(f"{prefix}memory_student")
        if isinstance(stored, Tensor) and len(stored) != len(self.memory_student):
            if len(self.targets):
                raise ACKDError(
                    f"the checkpoint keeps {len(stored)} training images for method CRD and the data have "
                    f"{len(self.targets)}; go on with the data that it was trained on"
                )
            for name in ("memory_student", "memory_teacher"):
                setattr(self, name, getattr(self, name).new_zeros(len(stored), self.embedding_size))
        self._first_step = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    def negatives_for(self, index: Tensor, target: Tensor) -> Tensor:
        """Images of other classes, for this step: a function of the step, the image and the position alone.

        Args:
            index: ``B`` int64.
            target: ``B`` int64, their classes.

        Returns:
            ``B x K`` int64 indices.
        """
        position = torch.arange(self.negatives, device=index.device)
        bits = keyed_bits(_STREAM, self.seed, self.steps, index[:, None], position[None, :])
        own = self.class_count[target][:, None]
        place = ((bits >> 31) * (len(self.by_class) - own)) >> 32  # 32 random bits times the choices, without bias
        place = place + own * (place >= self.class_start[target][:, None])  # step over the own class
        return self.by_class[place]

    def _check(self, batch: Batch) -> None:
        if not len(self.targets):
            raise ACKDError("method CRD does not know the training images yet; call set_targets with their classes")
        low, high, rows = int(batch.index.min()), int(batch.index.max()), len(self.targets)
        if low < 0 or high >= rows:
            raise ACKDError(
                f"batch.index goes from {low} to {high} and method CRD keeps {rows} training images; the data must "
                "give (image, target, index) with the image's position in the training set"
            )
        if not torch.equal(self.targets[batch.index], batch.target):
            raise ACKDError(
                "batch.index does not fit batch.target in method CRD: the class of an image differs from the one that "
                "`train_targets` has for its index; both must count the same training set"
            )

    # ---------------------------------------------------------------- loss

    def weights(self) -> dict[str, float]:
        """Weights of ``ce``, ``kd`` and ``crd``."""
        return {"ce": self.weight_ce, "kd": self.weight_kd, "crd": self.weight_crd}

    def _embed(self, student: NetOutput, teacher: NetOutput) -> tuple[Tensor, Tensor]:
        """Unit embeddings ``B x D`` of both, in float32 under mixed precision, too."""
        device = student.embedding.device.type
        with torch.autocast(device, enabled=False):
            ours, theirs = (
                unit(F.linear(each.float(), head.weight.float(), head.bias.float()))
                for each, head in (
                    (student.embedding, self.head_student),
                    (teacher.embedding.detach(), self.head_teacher),
                )
            )
        return ours, theirs

    def _scores(self, student: Tensor, teacher: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        samples = torch.cat([batch.index[:, None], self.negatives_for(batch.index, batch.target)], dim=1)
        return (
            contrast_scores(student, self.memory_teacher, samples, temperature=self.temperature),
            contrast_scores(teacher, self.memory_student, samples, temperature=self.temperature),
        )

    def _normalisers(self, scores: tuple[Tensor, Tensor]) -> Tensor:
        """Both Z: those of the first step; before it, of this batch over all processes."""
        if not self._first_step or bool((self.normalisers > 0).all()):
            return self.normalisers.float()
        rows = len(self.memory_student)
        return whole_batch(torch.stack([normaliser(each, rows=rows) for each in scores])[None]).mean(dim=0)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Terms ``ce``, ``kd`` and ``crd``; arguments as in the base class.

        Raises:
            ACKDError: when ``set_targets`` was not called, or indices do not fit.
        """
        assert teacher is not None
        if self._first_step:
            self._check(batch)
        scores = self._scores(*self._embed(student, teacher), batch)
        rows = len(self.memory_student)
        losses = [
            nce_loss(each, normaliser=constant, rows=rows)
            for each, constant in zip(scores, self._normalisers(scores), strict=True)
        ]
        return {
            "ce": cross_entropy(student.logits, batch.target),
            "kd": kd_loss(student.logits, teacher.logits, temperature=self.kd_temperature),
            "crd": torch.stack(losses).sum(),
        }

    @torch.no_grad()
    def observe(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
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
            self.normalisers.copy_(self._normalisers(self._scores(*embeddings, batch)))
            self._first_step = False
        index = whole_batch(batch.index)
        for memory, embedding in zip((self.memory_student, self.memory_teacher), embeddings, strict=True):
            memory[index] = moved_rows(memory, index, whole_batch(embedding), momentum=self.momentum)
        self.steps += 1
