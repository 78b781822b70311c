r"""FitNet. Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, 2015.

A middle stage of the student imitates a middle stage of the teacher through a regressor r, which is dropped after
training (arXiv:1412.6550, Eq. 3):

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{hint}\,\mathrm{mean}\,(r(F_n^s) - F_m^t)^2\)

The paper first trains the layers up to the hint and then distils; here, as in the benchmark, both terms are trained
from the first step. The regressor is a 1x1 convolution, BatchNorm and ReLU. Where height or width differ the larger map
is pooled first; the benchmark uses a strided convolution if the student's map is twice as large, a transposed one if it
is half as large, and supports no other sizes. The ReLU is the benchmark's: for a teacher whose stages do not end in one
(WRN, MobileNetV2) the regressor cannot reach negative values of the hint.

BatchNorm uses the batch statistics of its process, as in the student; ``sync_batchnorm`` synchronises both. It has no
running statistics, since the regressor is never evaluated.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import Method, Networks
from ackd_lightning.methods.pairing import layer_features, layer_shapes, pair_stages, regressor, same_size
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, PositiveInt


def fitnet_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Return the hint loss (Eq. 3): squared distance of two feature maps, mean over all entries.

    No gradient flows into the teacher.

    Args:
        student_feature: Feature map ``B x C x H x W`` of the student after the regressor.
        teacher_feature: Feature map ``B x C x H x W`` of the teacher.

    Returns:
        Scalar float32, in squared units of the teacher's feature.

    Examples:
        >>> import torch
        >>> fitnet_loss(torch.ones(1, 2, 4, 4), torch.full((1, 2, 4, 4), 3.0))
        tensor(4.)

    Raises:
        ACKDError: If the shapes differ.
    """
    if student_feature.shape != teacher_feature.shape:
        raise ACKDError(
            f"fitnet_loss got a feature {tuple(student_feature.shape)} of the student and "
            f"{tuple(teacher_feature.shape)} of the teacher; pass the student's through a regressor first"
        )
    return F.mse_loss(student_feature.float(), teacher_feature.detach().float())


class FitNet(Method):
    """Cross-entropy with the labels plus the distance of one stage, after a regressor, from the teacher's.

    Args:
        hint_stage: Number n of the student's stage F_n that is guided, from 1; 2 in the benchmark. The teacher's stage
            is found by resolution; of several that fit, the deepest is used.
        weight_ce: Weight of the cross-entropy; 1 in the benchmark that the ACKD paper compares with.
        weight_hint: Weight of the hint; 100 in the benchmark.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(
        self, *, hint_stage: PositiveInt = 2, weight_ce: NonNegative = 1.0, weight_hint: NonNegative = 100.0
    ) -> None:
        super().__init__()
        self.hint_stage = hint_stage
        self.loss_weights = {"ce": weight_ce, "hint": weight_hint}
        self.regressor: nn.Module = nn.Identity()

    def build(self, networks: Networks) -> None:
        """Find the teacher's stage for the guided stage and create the regressor.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the stages of a network are unknown, or the student has fewer.
        """
        student, teacher = networks.student, networks.teacher
        every = pair_stages(student, teacher, method="FitNet")
        pairs = [pair for pair in every if pair[0] == self.hint_stage]
        if not pairs:
            raise ACKDError(
                f"hint_stage is {self.hint_stage} in method FitNet and the student has {every[-1][0]} "
                "stages; choose one of them"
            )
        self.layers = (pairs[-1],)
        ((ours, theirs),) = layer_shapes(self.layers, student, teacher)
        self.regressor = regressor(ours[0], theirs[0])

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``hint``; arguments as in the base class."""
        assert teacher is not None
        (ours,), (theirs,) = layer_features(self.layers, student, teacher)
        guided, hint = same_size(ours, theirs.float())
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "hint": fitnet_loss(self.regressor(guided), hint),
        }
