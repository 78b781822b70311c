r"""AT. Zagoruyko, Komodakis: Paying More Attention to Attention, 2017 (arXiv:1612.03928).

The student learns at which positions the teacher's features are strong, whatever the channels:

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{at} \sum_{(n,m)} \mathrm{mean}\,(Q(F_n^s) - Q(F_m^t))^2\),
\(\quad Q(F) = q / \|q\|_2\), \(\quad q = \mathrm{vec}(\mathrm{mean}_c F_c^2)\) (the paper's sum of squares, p = 2).

As in the benchmark the squared difference is a mean over images and positions, hence the large weight. The benchmark
leaves out stages of the longer network; here every stage has a partner. The last feature is the input of global
pooling: for WRN after BatchNorm and ReLU, for MobileNetV2 after the last 1x1 convolution. The benchmark reads before
these layers; the rule here also holds for networks that the benchmark does not have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import Method, Networks
from ackd_lightning.methods.pairing import layer_features, pair_stages, same_size
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative


def attention_map(feature: Tensor) -> Tensor:
    r"""Return the attention map: mean of squares over channels, flattened, with an L2 norm of 1 per image.

    Args:
        feature: Feature map ``B x C x H x W``; gradients flow into it.

    Returns:
        ``B x (H * W)`` float32; zero for an image whose feature is zero.

    Examples:
        >>> attention_map(torch.tensor([[[[3.0, 0.0], [0.0, 0.0]]]]))
        tensor([[1., 0., 0., 0.]])
    """
    return F.normalize(feature.float().square().mean(dim=1).flatten(1), dim=1)


def at_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Return the squared distance of attention maps, mean over images and positions, summed over the pairs.

    In a pair of unequal height or width the larger map is pooled first. No gradient flows into
    the teacher.

    Args:
        student_features: Feature maps ``B x C x H x W``.
        teacher_features: Feature maps ``B x C' x H' x W'``, one for each of the student's.

    Returns:
        Scalar float32.

    Raises:
        ACKDError: If there are no features, or their numbers differ.
    """
    if not student_features or len(student_features) != len(teacher_features):
        raise ACKDError(
            f"at_loss got {len(student_features)} features of the student and {len(teacher_features)} of the teacher; "
            "pass one or more pairs, such as those of pair_stages"
        )
    losses = []
    for ours, theirs in zip(student_features, teacher_features, strict=True):
        student, teacher = same_size(ours.float(), theirs.detach().float())
        losses.append(F.mse_loss(attention_map(student), attention_map(teacher)))
    return torch.stack(losses).sum()


class AT(Method):
    """Cross-entropy with the labels plus the distance between attention maps of student and teacher.

    Args:
        weight_ce: Weight of the cross-entropy; 1 in the benchmark that the ACKD paper compares with.
        weight_at: Weight of the distance; 1000 in the benchmark.
    """

    labels = "mixed"

    def __init__(self, *, weight_ce: NonNegative = 1.0, weight_at: NonNegative = 1000.0) -> None:
        super().__init__()
        self.loss_weights = {"ce": weight_ce, "at": weight_at}

    def build(self, networks: Networks) -> None:
        """Pair the stages.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the stages of a network are unknown.
        """
        student, teacher = networks.student, networks.teacher
        self.layers = pair_stages(student, teacher, method="AT")

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``at``; arguments as in the base class."""
        assert teacher is not None
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "at": at_loss(*layer_features(self.layers, student, teacher)),
        }
