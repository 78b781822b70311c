r"""DIST. Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, 2022.

With \(P = \mathrm{softmax}(z / \tau)\), a ``B x K`` matrix, and \(\rho\) Pearson's correlation:

* between classes: \(L_{inter} = \frac1B \sum_i \left(1 - \rho(P^s_{i,:}, P^t_{i,:})\right)\), one row per image
* within classes: \(L_{intra} = \frac1K \sum_j \left(1 - \rho(P^s_{:,j}, P^t_{:,j})\right)\), one column per class

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{dist}\,\tau^2 (\beta L_{inter} + \gamma L_{intra})\), with \(\tau^2\) as
in public code for CIFAR.
"""

from __future__ import annotations

from torch import Tensor

from ackd_lightning.functional import correlation, cross_entropy, standardized, whole_batch
from ackd_lightning.methods.base import Method
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float, gamma: float, temperature: float
) -> Tensor:
    """Return one minus the correlation of class probabilities of student and teacher, over rows and over columns.

    A correlation ignores scale and shift of the probabilities. A constant row or column counts as uncorrelated and gets
    no gradient, so a batch of one image has no relation within classes. No gradient flows into the teacher.

    Args:
        student_logits: Logits ``B x K`` of the student.
        teacher_logits: Logits ``B x K`` of the teacher.
        beta: Weight of the relation between classes (rows).
        gamma: Weight of the relation within classes (columns).
        temperature: Temperature tau, above 0.

    Returns:
        Scalar float32, times tau squared.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> dist_loss(student, teacher, beta=1.0, gamma=1.0, temperature=1.0)  # all four correlations are -1
        tensor(4.)
    """
    student = (student_logits.float() / temperature).softmax(dim=1)
    teacher = (teacher_logits.detach().float() / temperature).softmax(dim=1)
    inter = 1 - correlation(student, teacher, dim=1).mean()
    intra = 1 - correlation(student, teacher, dim=0).mean()
    return (beta * inter + gamma * intra) * temperature**2


class DIST(Method):
    """Cross-entropy plus correlation with the probabilities of a teacher that may be much stronger.

    Args:
        beta: Weight of the relation between classes.
        gamma: Weight of the relation within classes.
        temperature: Temperature tau; 4 for CIFAR, 1 for ImageNet.
        standardize: Whether to standardise the logits of every image before the correlation term reads them.
        weight_ce: Weight of the cross-entropy.
        weight_dist: Weight of the correlation term.

    Raises:
        ACKDError: If a value is not allowed.
    """

    teacher = "logits"
    labels = "mixed"

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: Positive = 4.0,
        standardize: bool = False,
        weight_ce: NonNegative = 1.0,
        weight_dist: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.beta, self.gamma, self.temperature, self.standardize = beta, gamma, temperature, standardize
        self.loss_weights = {"ce": weight_ce, "dist": weight_dist}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``dist``, the latter on the global batch; arguments as in the base class."""
        assert teacher is not None
        logits = student.logits, teacher.logits.detach()
        if self.standardize:
            logits = standardized(logits[0]), standardized(logits[1])
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "dist": dist_loss(
                whole_batch(logits[0]),
                whole_batch(logits[1]),
                beta=self.beta,
                gamma=self.gamma,
                temperature=self.temperature,
            ),
        }
