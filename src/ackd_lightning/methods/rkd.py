r"""Relational knowledge distillation. Park, Kim, Lu, Cho: Relational Knowledge Distillation, 2019.

On the pooled features \(e_i\) of a batch, with \(\ell\) the Huber loss (smooth L1):

* distances (Eq. 5 to 7): \(d_{ij} = \|e_i - e_j\| / \mu\), \(\mu\) the mean over the pairs that differ;
  \(L_d = \mathrm{mean}_{ij}\,\ell(d^s_{ij}, d^t_{ij})\)
* angles (Eq. 8, 9): \(a_{ijk} = \langle u_{ij}, u_{ik}\rangle\), \(u_{ij} = (e_j - e_i) / \|e_j - e_i\|\);
  \(L_a = \mathrm{mean}_{ijk}\,\ell(a^s_{ijk}, a^t_{ijk})\)

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{rkd}\,(\lambda_d L_d + \lambda_a L_a)\). Means are taken over all B² pairs and B³
triplets, as in the authors' code and the benchmark.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.functional import cross_entropy, whole_batch
from ackd_lightning.methods.base import Method, Networks, embedding_of
from ackd_lightning.models.features import require_embedding
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative


def rkd_loss(
    student_embedding: Tensor, teacher_embedding: Tensor, *, distance_weight: float, angle_weight: float
) -> Tensor:
    """Return the difference of the relations between images: distances of pairs, angles of triplets.

    Relations do not change when the embeddings are shifted, rotated or scaled, and D may differ between the networks.
    Two images with the same embedding have distance 0, form no angle, and get no gradient from this pair. Differences
    are taken before squaring (the benchmark subtracts squares, which loses small distances). No gradient flows into the
    teacher.

    Args:
        student_embedding: Embeddings ``B x D`` of the student.
        teacher_embedding: Embeddings ``B x D'`` of the teacher.
        distance_weight: Weight of the distances.
        angle_weight: Weight of the angles.

    Returns:
        Scalar float32.

    Examples:
        >>> line, corner = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
        >>> rkd_loss(line, corner, distance_weight=25.0, angle_weight=50.0)
        tensor(2.4456)
    """

    def relations(embedding: Tensor) -> tuple[Tensor, Tensor]:
        embedding = embedding.float()
        between = embedding[None] - embedding[:, None]  # B x B x D: from i to j
        distance = torch.linalg.vector_norm(between, dim=2)
        apart = distance > 0
        unit = between / torch.where(apart, distance, 1.0)[:, :, None]
        mean = distance.sum() / apart.sum().clamp_min(1)
        with torch.autocast(embedding.device.type, enabled=False):
            angle = unit @ unit.transpose(1, 2)  # B x B x B
        return distance / torch.where(mean > 0, mean, 1.0), angle

    student_distance, student_angle = relations(student_embedding)
    with torch.no_grad():
        teacher_distance, teacher_angle = relations(teacher_embedding)
    distance_loss = F.smooth_l1_loss(student_distance, teacher_distance)
    angle_loss = F.smooth_l1_loss(student_angle, teacher_angle)
    return distance_weight * distance_loss + angle_weight * angle_loss


class RKD(Method):
    """Cross-entropy plus the relations between images that the teacher sees.

    Args:
        distance_weight: Weight of the distances inside the term; 25 in the paper and the benchmark.
        angle_weight: Weight of the angles inside the term; 50 in both.
        weight_ce: Weight of the cross-entropy.
        weight_rkd: Weight of the whole term.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        distance_weight: NonNegative = 25.0,
        angle_weight: NonNegative = 50.0,
        weight_ce: NonNegative = 1.0,
        weight_rkd: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.loss_weights = {"ce": weight_ce, "rkd": weight_rkd}

    def build(self, networks: Networks) -> None:
        """Check that the pooled features of both networks are known.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If one of them is unknown.
        """
        require_embedding(networks.student, "the student", "method RKD")
        require_embedding(networks.teacher, "the teacher", "method RKD")

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``rkd``, the latter on the global batch; arguments as in the base class."""
        assert teacher is not None
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "rkd": rkd_loss(
                whole_batch(embedding_of(student)),
                whole_batch(embedding_of(teacher).detach()),
                distance_weight=self.distance_weight,
                angle_weight=self.angle_weight,
            ),
        }
