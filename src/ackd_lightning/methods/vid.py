r"""VID. Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation, 2019 (arXiv:1904.05835).

The mutual information of the student's and the teacher's features is maximised. Its lower bound is a Gaussian whose
mean \(\mu\) is a small network on the student's feature and whose variance \(\sigma_c^2\) is learnt for each of the
teacher's channels (Eq. 6):

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{vid} \sum_{(n,m)} \mathrm{mean}\;
\frac12 \left( \frac{(\mu(F_n^s) - F_m^t)^2}{\sigma_c^2} + \log \sigma_c^2 \right)\),
\(\quad \sigma_c^2 = \log(1 + e^{\alpha_c}) + \epsilon\)

The constant of the Gaussian is left out, so the term can be negative. As in the benchmark, \(\mu\) is three 1x1
convolutions with ReLU between them and as many channels as the teacher, the term is a mean over images, channels and
positions, and the weight decay of the optimizer also applies to the parameters here. The benchmark leaves out stages of
the longer network; here every stage has a partner. The last feature is the input of global pooling: for WRN after
BatchNorm and ReLU, for MobileNetV2 after the last 1x1 convolution. The benchmark reads before these layers; the rule
here also holds for networks that the benchmark does not have.
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
    """Return the negative log-likelihood of a teacher's feature without its constant (Eq. 6), mean over all entries.

    Gradients flow into the prediction and the scale, not into the teacher.

    Args:
        predicted_mean: Mean ``B x C x H x W`` of the Gaussian.
        log_scale: Parameter alpha of each channel, ``C``. The variance is its softplus plus 1e-5, in squared units of
            the feature.
        teacher_feature: Feature ``B x C x H x W`` of the teacher.

    Returns:
        Scalar float32, in nats.

    Raises:
        ACKDError: If the shapes do not fit.

    Examples:
        >>> vid_loss(torch.zeros(1, 2, 4, 4), torch.zeros(2), torch.ones(1, 2, 4, 4))  # (1 / log 2 + log log 2) / 2
        tensor(0.5381)
    """
    if predicted_mean.shape != teacher_feature.shape or log_scale.shape != predicted_mean.shape[1:2]:
        raise ACKDError(
            f"vid_loss got a prediction {tuple(predicted_mean.shape)}, a scale {tuple(log_scale.shape)} and a "
            f"teacher's feature {tuple(teacher_feature.shape)}; "
            "prediction and feature must have one shape, and the scale one number per channel"
        )
    variance = (F.softplus(log_scale.float()) + LEAST_VARIANCE).reshape(1, -1, 1, 1)
    squares = (predicted_mean.float() - teacher_feature.detach().float()).square()
    return 0.5 * (squares / variance + variance.log()).mean()


class Gaussian(nn.Module):
    """The variational distribution q of one pair of features.

    Args:
        student_channels: Channels of the student's feature.
        teacher_channels: Channels C of the predicted feature.
        variance: Initial sigma squared.
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
        """Return the loss of Eq. 6. The larger of the two maps is pooled to the size of the smaller.

        Args:
            student_feature: Feature ``B x C' x H' x W'`` of the student.
            teacher_feature: Feature ``B x C x H x W`` of the teacher.

        Returns:
            Scalar float32, in nats.
        """
        student, teacher = same_size(student_feature, teacher_feature.float())
        return vid_loss(self.mean(student), self.log_scale, teacher)


class VID(Method):
    """Cross-entropy with the labels plus the likelihood of the teacher's features given the student's.

    Args:
        init_variance: Initial sigma squared of every channel; 5 in the benchmark.
        weight_ce: Weight of the cross-entropy; 1 in the benchmark that the ACKD paper compares with.
        weight_vid: Weight of the likelihood term; 1 in that benchmark.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(
        self, *, init_variance: Variance = 5.0, weight_ce: NonNegative = 1.0, weight_vid: NonNegative = 1.0
    ) -> None:
        super().__init__()
        self.init_variance = init_variance
        self.loss_weights = {"ce": weight_ce, "vid": weight_vid}
        self.gaussians = nn.ModuleList()

    def build(self, networks: Networks) -> None:
        """Pair the stages and create a distribution for every pair.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the stages of a network are unknown.
        """
        student, teacher = networks.student, networks.teacher
        self.layers = pair_stages(student, teacher, method="VID")
        self.gaussians = nn.ModuleList(
            Gaussian(ours[0], theirs[0], variance=self.init_variance)
            for ours, theirs in layer_shapes(self.layers, student, teacher)
        )

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``vid`` (summed over the pairs); arguments as in the base class."""
        assert teacher is not None
        features = layer_features(self.layers, student, teacher)
        losses = [gaussian(ours, theirs) for gaussian, ours, theirs in zip(self.gaussians, *features, strict=True)]
        return {"ce": cross_entropy(student.logits, batch.labels), "vid": torch.stack(losses).sum()}
