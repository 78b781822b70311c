r"""ITRD. Miles, Lopez-Rodriguez, Mikolajczyk: Information Theoretic Representation Distillation, BMVC 2022.

Two losses on the pooled embeddings \(z^s, z^t\) of the B images of a batch (arXiv:2112.00459). A linear layer maps the
student's to the teacher's D dimensions.

* correlation: with every dimension standardised over the batch, \(C_{ii} = \frac1B \sum_b z^s_{bi} z^t_{bi}\),
  \(L_{corr} = \log_2 \sum_{i=1}^{D} |C_{ii} - 1|^{2\alpha}\)
* mutual information: with the Gram matrices \(G\) of embeddings of length 1 and \(G^{st} = G^s \circ G^t\), each
  divided by its trace, \(L_{mi} = \|G^s\|_F^2 - \|G^{st}\|_F^2\)

\(L = w_{ce}\,\mathrm{CE} + w_{corr} L_{corr} + w_{mi} L_{mi}\). As in the authors' code, the standard deviations divide
by B - 1, so that C is at most 1 - 1/B and the logarithm is finite; \(L_{mi}\) has no logarithms; and it reads the
student's embedding itself where both have D dimensions. The defaults are those that the authors give for a wide ResNet
that teaches a wide ResNet, \(\alpha\) 1.01 and the weights 2 and 1; their program's own are 1.5, 2 and 0.05. A
dimension that is constant over the batch counts as uncorrelated and gets no gradient (ours).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.functional import correlation, cross_entropy, whole_batch
from ackd_lightning.methods.base import Method, Networks, embedding_of
from ackd_lightning.models.features import require_embedding
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


def correlation_loss(student: Tensor, teacher: Tensor, *, alpha: float) -> Tensor:
    """Return the loss of correlated dimensions. No gradient flows into the teacher.

    Args:
        student: Embeddings ``B x D`` of the student.
        teacher: Embeddings ``B x D`` of the teacher.
        alpha: Order alpha of Renyi's entropy, above 0.

    Returns:
        Scalar float32, in bits.

    Examples:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        >>> correlation_loss(student, teacher, alpha=1.0)  # C is 0.5 and -0.5: log2(0.25 + 2.25)
        tensor(1.3219)
    """
    images = len(student)
    correlations = correlation(student.float(), teacher.detach().float(), dim=0) * (1 - 1 / images)
    return (1 - correlations).pow(2 * alpha).sum().log2()


def mutual_information_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of mutual information. No gradient flows into the teacher.

    Args:
        student: Embeddings ``B x D`` of the student.
        teacher: Embeddings ``B x D'`` of the teacher.

    Returns:
        Scalar float32, 0 or more.

    Examples:
        >>> student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> mutual_information_loss(student, teacher)  # four entries of 1/2 against two of them
        tensor(0.5000)
    """

    def gram(embedding: Tensor) -> Tensor:
        unit = F.normalize(embedding.float(), dim=1)
        return unit @ unit.T

    def energy(matrix: Tensor) -> Tensor:
        return (matrix / matrix.trace().clamp_min(1e-12)).square().sum()

    ours, theirs = gram(student), gram(teacher.detach())
    return energy(ours) - energy(ours * theirs)


class ITRD(Method):
    """Cross-entropy plus correlation of dimensions and mutual information of images, on embeddings of any networks.

    Args:
        alpha: Order alpha of Renyi's entropy in the term ``corr``, above 0.
        weight_ce: Weight of the cross-entropy.
        weight_corr: Weight of the correlation term.
        weight_mi: Weight of the term of mutual information.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        alpha: Positive = 1.01,
        weight_ce: NonNegative = 1.0,
        weight_corr: NonNegative = 2.0,
        weight_mi: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.loss_weights = {"ce": weight_ce, "corr": weight_corr, "mi": weight_mi}

    def build(self, networks: Networks) -> None:
        """Create the linear layer.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the pooled feature of a network is unknown.
        """
        ours = require_embedding(networks.student, "the student", "method ITRD")
        theirs = require_embedding(networks.teacher, "the teacher", "method ITRD")
        self.projector = nn.Linear(ours, theirs)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return ``ce``, and ``corr`` and ``mi`` of the global batch; arguments as in the base class."""
        assert teacher is not None
        ours, theirs = whole_batch(embedding_of(student)).float(), whole_batch(embedding_of(teacher).detach()).float()
        with torch.autocast(ours.device.type, enabled=False):
            projected = F.linear(ours, self.projector.weight.float(), self.projector.bias.float())
            correlated = correlation_loss(projected, theirs, alpha=self.alpha)
            shared = mutual_information_loss(ours if ours.shape[1] == theirs.shape[1] else projected, theirs)
        return {"ce": cross_entropy(student.logits, batch.labels), "corr": correlated, "mi": shared}
