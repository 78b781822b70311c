r"""Correlation congruence. Peng et al.: Correlation Congruence for Knowledge Distillation, 2019.

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{cc}\,L_{cc}\) on embeddings \(e = W f + b\) of both pooled features f, with
trained W and b for each network. The argument ``kernel`` chooses what is compared within a batch of B images:

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
    """Return the benchmark's loss: products of the differences of neighbours, mean over B - 1 pairs, sum over D.

    It depends on the order of the images. Gradients flow into both arguments.

    Args:
        student_embedding: Embeddings ``B x D`` of the student.
        teacher_embedding: Embeddings ``B x D`` of the teacher.

    Returns:
        Scalar float32; 0 for a single image, which has no neighbour.

    Examples:
        >>> cc_loss(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.zeros(2, 2))  # 1 * 0 + 2 * 3
        tensor(6.)
    """
    difference = (student_embedding.float() - teacher_embedding.float()).abs()
    return (difference[:-1] * difference[1:]).sum() / max(1, len(difference) - 1)


def cc_kernel_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, *, gamma: float = 0.4, order: int = 2
) -> Tensor:
    r"""Return the mean squared difference of two Gaussian correlation matrices, each a Taylor polynomial.

    For embeddings x, y of length 1: \(e^{-\gamma \|x - y\|^2} \approx e^{-2\gamma} \sum_{p=0}^{P}
    \frac{(2\gamma)^p}{p!} \langle x, y\rangle^p\). Gradients flow into both arguments.

    Args:
        student_embedding: Embeddings ``B x D`` of any length; they are normalised here.
        teacher_embedding: Embeddings ``B x D'``.
        gamma: Exponent of the Gaussian, above 0.
        order: Order P of the polynomial, 1 or more.

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

    With several processes the global batch is put together in the order of torch's samplers (process r of W has the
    images r, r + W, ...), so that ``consecutive`` compares the same neighbours as one process. With another sampler
    its value is that of another order of the same images.

    Args:
        kernel: Kind of the comparison, ``consecutive`` or ``rbf``, see above.
        embedding_size: Width D of the embeddings.
        gamma: Exponent of the kernel ``rbf``.
        order: Order of the Taylor expansion of ``rbf``.
        weight_ce: Weight of the cross-entropy.
        weight_cc: Weight of the congruence; 0.02 is the benchmark's for ``consecutive``.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

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
        """Create the two linear embeddings.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the pooled feature of a network is unknown.
        """
        student, teacher = networks.student, networks.teacher
        ours = require_embedding(student, "the student", "method CC")
        theirs = require_embedding(teacher, "the teacher", "method CC")
        self.embed_learner = nn.Linear(ours, self.embedding_size)
        self.embed_source = nn.Linear(theirs, self.embedding_size)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``cc``; arguments as in the base class.

        Gradients of ``cc`` reach the student and both embedding layers.
        """
        assert teacher is not None
        ours = whole_batch(self.embed_learner(embedding_of(student)))
        theirs = whole_batch(self.embed_source(embedding_of(teacher).detach()))
        if self.kernel == "rbf":
            congruence = cc_kernel_loss(ours, theirs, gamma=self.gamma, order=self.order)
        else:
            congruence = cc_loss(ours, theirs)
        return {"ce": cross_entropy(student.logits, batch.labels), "cc": congruence}
