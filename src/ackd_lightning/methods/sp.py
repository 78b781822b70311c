r"""SP. Tung, Mori: Similarity-Preserving Knowledge Distillation, 2019 (arXiv:1907.09682).

Images that are similar for the teacher become similar for the student, each network in its own feature space:

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{sp}\,\frac{1}{B^2} \|G^t - G^s\|_F^2\),
\(\quad G = \mathrm{rows\ of\ } A A^\top \mathrm{\ divided\ by\ their\ L2\ norm}\) (Eq. 1 to 4), A the last feature,
``B x (C * H * W)``.

The paper sums over several layers; this file uses the last one, as the benchmark does. It is the input of global
pooling: for WRN after BatchNorm and ReLU, for MobileNetV2 after the last 1x1 convolution. The benchmark reads before
these layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.functional import cross_entropy, whole_batch
from ackd_lightning.methods.base import Method, Networks
from ackd_lightning.methods.pairing import layer_features, pair_stages
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative


def similarities(feature: Tensor) -> Tensor:
    """Return the similarities of the images of a batch: inner products of features, with an L2 norm of 1 per row.

    Args:
        feature: Features ``B x ...``; gradients flow into them.

    Returns:
        ``B x B`` float32; the row of an image whose feature is zero is zero.

    Examples:
        >>> similarities(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        tensor([[0.3162, 0.9487],
                [0.1191, 0.9929]])
    """
    with torch.autocast(feature.device.type, enabled=False):  # it would round the product to half precision
        flat = feature.float().flatten(1)
        return F.normalize(flat @ flat.T, dim=1)


def sp_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Return the similarity-preserving loss (Eq. 4): squared distance of similarities, mean over pairs of images.

    The shapes of the features may differ. No gradient flows into the teacher. The value depends on the images of the
    batch: with several processes gather them first (``whole_batch``), as `SP` does.

    Args:
        student_feature: Features ``B x ...`` of the student.
        teacher_feature: Features ``B x ...`` of the teacher.

    Returns:
        Scalar float32.
    """
    return F.mse_loss(similarities(student_feature), similarities(teacher_feature.detach()))


class SP(Method):
    """Cross-entropy with the labels plus the distance between similarities of student and teacher.

    Args:
        weight_ce: Weight of the cross-entropy; 1 in the benchmark that the ACKD paper compares with.
        weight_sp: Weight of the distance; 3000 in the benchmark.
    """

    labels = "mixed"

    def __init__(self, *, weight_ce: NonNegative = 1.0, weight_sp: NonNegative = 3000.0) -> None:
        super().__init__()
        self.loss_weights = {"ce": weight_ce, "sp": weight_sp}

    def build(self, networks: Networks) -> None:
        """Find the last stages.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the stages of a network are unknown.
        """
        student, teacher = networks.student, networks.teacher
        self.layers = pair_stages(student, teacher, method="SP")[-1:]

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``sp``; arguments as in the base class."""
        assert teacher is not None
        (ours,), (theirs,) = layer_features(self.layers, student, teacher)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "sp": sp_loss(whole_batch(ours), whole_batch(theirs)),
        }
