r"""CRD. Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020 (arXiv:1910.10699).

Both networks' pooled embeddings go through a linear head to the unit sphere, \(e^s\) and \(e^t\). Two memories keep
running embeddings of all N training images, \(m^s\) and \(m^t\). An embedding is pulled towards the other network's
memory of the same image and pushed away from its memories of K images of other classes (noise-contrastive estimation):

\(h(e, m) = \exp(e \cdot m / \tau) / Z,\quad c = K / N\)

\(L(e, m) = -\frac{1}{B} \sum_b \Big[ \log \frac{h(e_b, m_b)}{h(e_b, m_b) + c}
+ \sum_{k=1}^{K} \log \frac{c}{h(e_b, m_{n_{bk}}) + c} \Big]\)

\(L = w_{ce}\,\mathrm{CE} + w_{kd}\,L_{KD} + w_{crd}\,[L(e^s, m^t) + L(e^t, m^s)]\)

Each Z is N times the mean of \(\exp(e \cdot m / \tau)\) over the first batch and is not changed later. After every
step the rows of the batch are moved, \(m \leftarrow \mathrm{norm}(\mu m + (1 - \mu) e)\).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss, whole_batch
from ackd_lightning.methods.base import FitInfo, Method, Networks, embedding_of
from ackd_lightning.methods.crd_loss import contrast_scores, crd_loss, moved_rows, normaliser, unit
from ackd_lightning.methods.crd_negatives import NegativeSampler
from ackd_lightning.methods.rows import check_rows
from ackd_lightning.models.features import require_embedding
from ackd_lightning.random import mix
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive, PositiveInt, Range

_STREAM = 0x435244  # keeps these random numbers apart from all others


class CRD(Method):
    """Cross-entropy plus contrastive representation distillation, and plain distillation if its weight is above 0.

    Two memories, which are part of a checkpoint, have one row for every training image by ``Batch.index``. Negatives
    are images of other classes, drawn with replacement. They depend only on (seed, step, image, position), not on the
    device or the number of processes. (The benchmark draws without replacement where there are enough images; K = 16384
    of 50,000.) With several processes each has the same memories, which the global batch moves.

    Indices are checked in the first step only, since the check waits for the GPU.

    Args:
        embedding_size: Width D of both heads.
        negatives: Number K of negatives for every image.
        temperature: Temperature tau of the contrast, above 0.
        momentum: Share mu of the old row when a memory is moved, in [0, 1).
        kd_temperature: Temperature of the distillation term, above 0.
        weight_ce: Weight of the cross-entropy.
        weight_kd: Weight of the distillation term; 1 for the paper's CRD+KD.
        weight_crd: Weight of the contrastive term.

    Raises:
        ACKDError: If a value is not allowed.
    """

    replicated_buffers = (
        *("memory_student", "memory_teacher"),
        *(f"sampler.{name}" for name in NegativeSampler.TABLES),
    )
    compile_modules = ("sampler",)
    labels = "smoothed"

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
        """Create both heads.

        Args:
            networks: Shapes and structures of student and teachers.

        Raises:
            ACKDError: If the pooled feature of a network is unknown.
        """
        student, teacher = networks.student, networks.teacher
        ours = require_embedding(student, "the student", "method CRD")
        theirs = require_embedding(teacher, "the teacher", "method CRD")
        self.head_student = nn.Linear(ours, self.embedding_size)
        self.head_teacher = nn.Linear(theirs, self.embedding_size)

    # ---------------------------------------------------------------- memories

    def begin_fit(self, fit: FitInfo) -> None:
        """Create both memories and the tables of the classes; memories of the right size are kept.

        Args:
            fit: Information about the fit, of which targets and seed are read.

        Raises:
            ACKDError: If the targets are unknown or belong to one class, which has no negatives.
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
        """Take the number of images from the checkpoint, the only source of it outside a fit."""
        stored = state_dict.get(f"{prefix}memory_student")
        if isinstance(stored, Tensor) and len(stored) != len(self.memory_student):
            if known := len(self.sampler.targets):
                raise ACKDError(
                    f"the checkpoint has {len(stored)} training images for method CRD and the data have {known}; use "
                    "the data that it was trained on"
                )
            for name in ("memory_student", "memory_teacher"):
                setattr(self, name, getattr(self, name).new_zeros(len(stored), self.embedding_size))
        self._first_step = True
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---------------------------------------------------------------- loss

    def _embed(self, student: NetOutput, teacher: NetOutput) -> tuple[Tensor, Tensor]:
        """Return the unit embeddings ``B x D`` of both networks, in float32 also under mixed precision."""
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
        """Return the rows of every image: itself, then its negatives."""
        negatives: Tensor = self.sampler(batch.index, batch.target, self.steps)
        return torch.cat([batch.index[:, None], negatives], dim=1)

    @torch.no_grad()
    def _normalisers(self, student: Tensor, teacher: Tensor, samples: Tensor) -> Tensor:
        """Return both Z: those of the first step, or in the first step those of the global batch."""
        if not self._first_step or bool((self.normalisers > 0).all()):
            return self.normalisers.float()
        rows = len(self.memory_student)
        scores = (
            contrast_scores(student, self.memory_teacher, samples, temperature=self.temperature),
            contrast_scores(teacher, self.memory_student, samples, temperature=self.temperature),
        )
        return whole_batch(torch.stack([normaliser(each, rows=rows) for each in scores])[None]).mean(dim=0)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``kd`` and ``crd``; arguments as in the base class.

        Raises:
            ACKDError: If ``begin_fit`` was not called, or the indices do not fit.
        """
        assert teacher is not None
        if self._first_step:
            check_rows(batch, self.sampler.targets, "CRD")
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
        logits = student.logits if self.loss_weights["kd"] == 0 else teacher.logits  # those may be of other classes
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "kd": kd_loss(student.logits, logits, temperature=self.kd_temperature),
            "crd": contrast,
        }

    @torch.no_grad()
    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Keep Z of the first step, move rows of the global batch, count the step; arguments as in the base class."""
        assert teacher is not None
        embeddings = self._embed(student, teacher)
        if self._first_step:
            check_rows(batch, self.sampler.targets, "CRD")
            self.normalisers.copy_(self._normalisers(*embeddings, self._samples(batch)))
            self._first_step = False
        index = whole_batch(batch.index)
        for memory, embedding in zip((self.memory_student, self.memory_teacher), embeddings, strict=True):
            memory[index] = moved_rows(memory, index, whole_batch(embedding), momentum=self.momentum)
        self.steps += 1
