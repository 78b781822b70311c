r"""VkD. Miles, Elezi, Deng: VkD: Improving Knowledge Distillation using Orthogonal Projections, CVPR 2024.

The student's pooled embedding \(z^s\) goes through a projector with orthonormal rows or columns, which keeps the angles
and distances between images, and is compared with the teacher's normalised embedding (arXiv:2403.06213):

\(P = \exp(W - W^T)_{[:d_s, :d_t]},\quad L_{vkd} = \mathrm{smooth}\,L_1(z^s P,\ \mathrm{LN}(z^t))\)

with the matrix exponential of a skew-symmetric matrix and LN, which subtracts the mean over the dimensions and divides
by their standard deviation. \(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{vkd} L_{vkd}\), both weights 1 as in the authors'
program, which also has KL between the logits with weight 1 (``--config vkd+kd``). They train a transformer with a
convolutional teacher; here the embedding of any network is read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import Method, Networks, embedding_of
from ackd_lightning.models.features import require_embedding
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative


class OrthogonalProjector(nn.Module):
    """Linear map whose matrix has orthonormal rows, or orthonormal columns if it maps to fewer dimensions.

    Args:
        inputs: Dimensions d_s of the input.
        outputs: Dimensions d_t of the output.

    Examples:
        >>> matrix = OrthogonalProjector(2, 3).matrix()
        >>> (matrix @ matrix.T).round(decimals=3).abs().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        size = max(inputs, outputs)
        self.weight = nn.Parameter(torch.empty(size, size))
        nn.init.normal_(self.weight, std=size**-0.5)

    def matrix(self) -> Tensor:
        """Return the matrix P, ``d_s x d_t`` float32."""
        weight = self.weight.float()
        rotation: Tensor = torch.linalg.matrix_exp(weight - weight.T)
        return rotation[: self.inputs, : self.outputs]

    def forward(self, embedding: Tensor) -> Tensor:
        """Project embeddings, in float32.

        Args:
            embedding: ``B x d_s``.

        Returns:
            ``B x d_t`` float32.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            return embedding.float() @ self.matrix()


def vkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """Return the smooth L1 distance from the normalised embedding. No gradient flows into the teacher.

    Args:
        projected: Projected embeddings ``B x D`` of the student.
        teacher: Embeddings ``B x D`` of the teacher.

    Returns:
        Scalar float32, mean over images and dimensions.

    Examples:
        >>> vkd_loss(torch.tensor([[1.5, 1.0]]), torch.tensor([[7.0, 3.0]]))  # from (1, -1)
        tensor(0.8125)
    """
    target = F.layer_norm(teacher.detach().float(), teacher.shape[1:])
    return F.smooth_l1_loss(projected.float(), target)


class VkD(Method):
    """Cross-entropy plus distance of an orthogonally projected embedding from the teacher's, for any two networks.

    Args:
        weight_ce: Weight of the cross-entropy.
        weight_vkd: Weight of the distance.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(self, *, weight_ce: NonNegative = 1.0, weight_vkd: NonNegative = 1.0) -> None:
        super().__init__()
        self.loss_weights = {"ce": weight_ce, "vkd": weight_vkd}

    def build(self, networks: Networks) -> None:
        """Create the projector.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the pooled feature of a network is unknown.
        """
        ours = require_embedding(networks.student, "the student", "method VkD")
        theirs = require_embedding(networks.teacher, "the teacher", "method VkD")
        self.projector = OrthogonalProjector(ours, theirs)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``vkd``; arguments as in the base class."""
        assert teacher is not None
        projected = self.projector(embedding_of(student))
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "vkd": vkd_loss(projected, embedding_of(teacher)),
        }
