r"""VID. Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation, 2019 (arXiv:1904.05835).

The student's features should tell as much as possible about the teacher's. The mutual information is bounded from
below by a Gaussian whose mean \(\mu\) is a small network on the student's feature and whose variance \(\sigma_c^2\)
is learnt for each of the teacher's channels (Eq. 6):

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{vid} \sum_{(n,m)} \mathrm{mean}\;
\frac12 \left( \frac{(\mu(F_n^s) - F_m^t)^2}{\sigma_c^2} + \log \sigma_c^2 \right)\),
\(\quad \sigma_c^2 = \log(1 + e^{\alpha_c}) + \epsilon\)

The constant of the Gaussian is left out, so the term can be negative. As in the benchmark, \(\mu\) is three 1x1
convolutions with ReLU between them and as many channels as the teacher, the term is a mean over images, channels and
positions, and the weight decay of the optimizer holds for everything that is learnt here. The benchmark leaves out
stages of the longer network; here every stage has a partner. The last feature is the one that pooling sees: for WRN
after BatchNorm and ReLU, for MobileNetV2 after the last 1x1 convolution, where the benchmark reads before them:
one rule, what pooling sees, serves networks that the benchmark does not have.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import Method, Networks
from ackd_lightning.methods.pairing import layer_features, layer_shapes, pair_stages, same_size
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Range

LEAST_VARIANCE = 1e-5
Variance = Annotated[float, Range(LEAST_VARIANCE, open_low=True)]


def vid_loss(predicted_mean: Tensor, log_scale: Tensor, teacher_feature: Tensor) -> Tensor:
    """Negative log-likelihood of a teacher's feature without its constant (Eq. 6), mean over everything.

    The gradient flows into the prediction and the scale, not into the teacher.

    Args:
        predicted_mean: ``B x C x H x W``, mean of the Gaussian.
        log_scale: ``C``, alpha: the variance is its softplus plus 1e-5, in squared units of the feature.
        teacher_feature: ``B x C x H x W``.

    Returns:
        Scalar float32, in nats.

    Raises:
        ACKDError: when the three do not fit.
    """
    if predicted_mean.shape != teacher_feature.shape or log_scale.shape != predicted_mean.shape[1:2]:
        raise ACKDError(
            f"vid_loss got a prediction {tuple(predicted_mean.shape)}, a scale {tuple(log_scale.shape)} and a "
            f"teacher's feature {tuple(teacher_feature.shape)}; "
            "make prediction and feature equal, and the scale one per channel"
        )
    variance = (F.softplus(log_scale.float()) + LEAST_VARIANCE).reshape(1, -1, 1, 1)
    squares = (predicted_mean.float() - teacher_feature.detach().float()).square()
    return 0.5 * (squares / variance + variance.log()).mean()


class Gaussian(nn.Module):
    """The variational distribution q of one pair of features.

    Args:
        student_channels: of the feature that is given.
        teacher_channels: C of the feature that is predicted.
        variance: sigma squared at the start.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, variance: float) -> None:
        super().__init__()
        widths = (student_channels, teacher_channels, teacher_channels, teacher_channels)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.ReLU()]
        self.mean = nn.Sequential(*layers[:-1])
        excess = variance - LEAST_VARIANCE
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), excess + math.log(-math.expm1(-excess))))

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Loss of Eq. 6.

        Args:
            student_feature: ``B x C' x H' x W'``.
            teacher_feature: ``B x C x H x W``; the larger map of the two is pooled first.

        Returns:
            Scalar float32, in nats.
        """
        student, teacher = same_size(student_feature, teacher_feature.float())
        return vid_loss(self.mean(student), self.log_scale, teacher)


class VID(Method):
    """Cross-entropy with the labels plus, per stage, how badly the student's feature predicts the teacher's.

    Args:
        init_variance: sigma squared of every channel at the start; 5 in the benchmark.
        weight_ce: weight of the cross-entropy; 1 in the benchmark that the ACKD paper compares with.
        weight_vid: weight of the prediction term; 1 there.

    Raises:
        ACKDError: for a variance of 1e-5 or less.
    """

    def __init__(
        self, *, init_variance: Variance = 5.0, weight_ce: NonNegative = 1.0, weight_vid: NonNegative = 1.0
    ) -> None:
        super().__init__()
        self.init_variance = init_variance
        self.loss_weights = {"ce": weight_ce, "vid": weight_vid}
        self.gaussians = nn.ModuleList()

    def build(self, networks: Networks) -> None:
        """Pair the stages and make a distribution for every pair.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: when the stages of a network are not known.
        """
        student, teacher = networks.student, networks.teacher
        self.layers = pair_stages(student, teacher, method="VID")
        self.gaussians = nn.ModuleList(
            Gaussian(ours[0], theirs[0], variance=self.init_variance)
            for ours, theirs in layer_shapes(self.layers, student, teacher)
        )

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Terms ``ce`` and ``vid`` (summed over the pairs); arguments as in the base class."""
        assert teacher is not None
        features = layer_features(self.layers, student, teacher)
        losses = [gaussian(ours, theirs) for gaussian, ours, theirs in zip(self.gaussians, *features, strict=True)]
        return {"ce": cross_entropy(student.logits, batch.target), "vid": torch.stack(losses).sum()}
