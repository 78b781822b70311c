r"""Correlation congruence. Peng et al.: Correlation Congruence for Knowledge Distillation, 2019.

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{cc}\,L_{cc}\) on embeddings \(e = W f + b\) of both pooled features f, with
trained W and b on either side. What is compared within a batch of B images depends on ``kernel``:

* ``consecutive``, the benchmark's: \(L_{cc} = \frac{1}{B - 1} \sum_i \langle\delta_i, \delta_{i+1}\rangle\) with
  \(\delta_i = |e^s_i - e^t_i|\), images in the order of the batch
* ``rbf``, the paper's: \(L_{cc} = \frac{1}{B^2} \| C^s - C^t \|_F^2\) with \(C_{ij}\) the Gaussian kernel between
  images i and j in its Taylor expansion, which the order of the images does not change
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.functional import cross_entropy, whole_batch
from ackd_lightning.methods.base import Method, Networks, embedding_of
from ackd_lightning.models.features import require_embedding
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive, PositiveInt

CCKernel = Literal["consecutive", "rbf"]


def cc_loss(student_embedding: Tensor, teacher_embedding: Tensor) -> Tensor:
    """Products of neighbours' differences, as the benchmark has it: mean over the B - 1 pairs, sum over D.

    It depends on the order of the images. The gradient flows into both arguments.

    Args:
        student_embedding: ``B x D``.
        teacher_embedding: ``B x D``.

    Returns:
        Scalar float32; 0 for a single image, which has no neighbour.
    """
    difference = (student_embedding.float() - teacher_embedding.float()).abs()
    return (difference[:-1] * difference[1:]).sum() / max(1, len(difference) - 1)


def cc_kernel_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, *, gamma: float = 0.4, order: int = 2
) -> Tensor:
    r"""Mean squared difference of two Gaussian correlation matrices, each expanded to a Taylor polynomial.

    For embeddings x, y of length 1: \(e^{-\gamma \|x - y\|^2} \approx e^{-2\gamma} \sum_{p=0}^{P}
    \frac{(2\gamma)^p}{p!} \langle x, y\rangle^p\). The gradient flows into both arguments.

    Args:
        student_embedding: ``B x D``, scaled to length 1 in here.
        teacher_embedding: ``B x D'``.
        gamma: of the Gaussian, > 0.
        order: P, 1 or more.

    Returns:
        Scalar float32.
    """

    def correlation(embedding: Tensor) -> Tensor:
        unit = F.normalize(embedding.float(), dim=1)
        with torch.autocast(unit.device.type, enabled=False):  # it would round the product to half precision
            cosine = unit @ unit.T
        powers = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(1, order + 1)]  # p = 0 cancels
        return math.exp(-2 * gamma) * torch.stack(powers).sum(dim=0)

    return (correlation(student_embedding) - correlation(teacher_embedding)).square().mean()


class CC(Method):
    """Cross-entropy plus congruence of the correlations between images.

    Both networks' pooled features are embedded by a linear layer each, and both layers are trained, as in the
    benchmark: nothing but weight decay and chance keeps the embeddings from shrinking to a point.

    With several processes the batch is put together in the order in which the usual samplers deal it out (process r
    has every image whose number leaves the remainder r), so that ``consecutive`` sees the neighbours that one process
    would see. With a sampler that deals otherwise its value is that of another order of the same images.

    Args:
        kernel: what is compared, see above.
        embedding_size: D of the embeddings.
        gamma: of the kernel ``rbf``.
        order: of its Taylor expansion.
        weight_ce: weight of the cross-entropy.
        weight_cc: weight of the congruence; 0.02 is the benchmark's for ``consecutive``.

    Raises:
        ACKDError: for a kernel that is not known, or a number that is out of its range.
    """

    def __init__(
        self,
        *,
        kernel: CCKernel = "consecutive",
        embedding_size: PositiveInt = 128,
        gamma: Positive = 0.4,
        order: PositiveInt = 2,
        weight_ce: NonNegative = 1.0,
        weight_cc: NonNegative = 0.02,
    ) -> None:
        super().__init__()
        self.kernel, self.embedding_size, self.gamma, self.order = kernel, embedding_size, gamma, order
        self.loss_weights = {"ce": weight_ce, "cc": weight_cc}
        self.embed_learner: nn.Module = nn.Identity()
        self.embed_source: nn.Module = nn.Identity()

    def build(self, networks: Networks) -> None:
        """Make the two linear embeddings.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: when a network hands out no pooled feature.
        """
        student, teacher = networks.student, networks.teacher
        ours = require_embedding(student, "the student", "method CC")
        theirs = require_embedding(teacher, "the teacher", "method CC")
        self.embed_learner = nn.Linear(ours, self.embedding_size)
        self.embed_source = nn.Linear(theirs, self.embedding_size)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Terms ``ce`` and ``cc``; arguments as in the base class.

        ``cc`` reaches the student and both embedding layers.
        """
        assert teacher is not None
        ours = whole_batch(self.embed_learner(embedding_of(student)))
        theirs = whole_batch(self.embed_source(embedding_of(teacher).detach()))
        if self.kernel == "rbf":
            congruence = cc_kernel_loss(ours, theirs, gamma=self.gamma, order=self.order)
        else:
            congruence = cc_loss(ours, theirs)
        return {"ce": cross_entropy(student.logits, batch.target), "cc": congruence}
