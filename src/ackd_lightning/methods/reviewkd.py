r"""ReviewKD. Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, 2021 (arXiv:2104.09044).

From the deepest level to the shallowest, the student's feature is fused with the result of the next deeper level
(attention based fusion, ABF), so that all deeper levels of the student learn from a level of the teacher:

\(U_i = \mathrm{ABF}(F_{n_i}^s, U_{i+1})\), \(\quad L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{review}\,\rho(e) \sum_i
\mathrm{HCL}(\mathrm{out}(U_i), F_{m_i}^t)\) (Eq. 7 and 8)

Levels are the pairs of stages and the pooled embedding. \(\rho\) grows linearly over the first epochs to 1. The
hierarchical context loss HCL compares two maps at full size and pooled to 4 x 4, 2 x 2 and 1 x 1.

The authors' code reads features before the last ReLU of a stage; here they are the outputs of the stages, and the last
is the input of global pooling. BatchNorm in the fusion uses the batch statistics of its process, as in the student;
``sync_batchnorm`` synchronises both. It has no running statistics, since the fusion is never evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import FitInfo, Method, Networks, embedding_of
from ackd_lightning.methods.pairing import layer_features, layer_shapes, pair_stages
from ackd_lightning.methods.warmup import linear_warmup, tell_if_shorter
from ackd_lightning.models.features import require_embedding
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, NonNegativeInt, PositiveInt

CONTEXTS = (4, 2, 1)
WIDEST = 512


def hcl_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Return the hierarchical context loss (Sec. 3.4): squared distance of maps and of pooled maps.

    Weights are 1 for the map itself and 1/2, 1/4, 1/8 for the poolings to 4 x 4, 2 x 2 and 1 x 1 that make it smaller,
    divided by their sum. Mean over images, channels and positions; summed over the pairs. No gradient flows
    into the teacher.

    Args:
        student_features: Feature maps ``B x C x H x W``.
        teacher_features: Feature maps of the same shapes in the same order.

    Returns:
        Scalar float32, in squared units of the teacher's features.

    Examples:
        >>> hcl_loss([torch.full((1, 2, 8, 8), 3.0)], [torch.ones(1, 2, 8, 8)])
        tensor(4.)

    Raises:
        ACKDError: If the shapes differ, or there are no features.
    """
    ours, theirs = ([tuple(each.shape) for each in features] for features in (student_features, teacher_features))
    if not ours or ours != theirs:
        raise ACKDError(
            f"hcl_loss got features {ours} of the student and {theirs} of the teacher; "
            "pass one or more pairs of equal shape"
        )
    losses = []
    for student_feature, teacher_feature in zip(student_features, teacher_features, strict=True):
        difference = student_feature.float() - teacher_feature.detach().float()  # pooling is linear
        smaller = [side for side in CONTEXTS if side < min(difference.shape[2:])]
        maps = [difference, *(F.adaptive_avg_pool2d(difference, side) for side in smaller)]
        shares = [0.5**level for level in range(len(maps))]
        levels = [share * each.square().mean() for share, each in zip(shares, maps, strict=True)]
        losses.append(torch.stack(levels).sum() / sum(shares))
    return torch.stack(losses).sum()


def _convolution(inputs: int, outputs: int, side: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, track_running_stats=False))


class Fusion(nn.Module):
    """Attention based fusion (ABF, Fig. 3) of one level with the result of the next deeper level.

    Args:
        student_channels: Channels of the student's feature.
        middle_channels: Channels M of the fused map.
        teacher_channels: Channels D of the teacher's feature.
        deepest: Whether this is the deepest level, which has no other to fuse with.
    """

    def __init__(self, student_channels: int, middle_channels: int, teacher_channels: int, *, deepest: bool) -> None:
        super().__init__()
        self.enter = _convolution(student_channels, middle_channels, 1)
        self.attention = None if deepest else nn.Conv2d(2 * middle_channels, 2, 1)
        self.leave = _convolution(middle_channels, teacher_channels, 3)

    def forward(self, feature: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Fuse two levels, resize the result and predict the teacher's feature.

        Args:
            feature: Feature ``B x C x H x W`` of the student.
            deeper: Fused map ``B x M x H' x W'`` of the next deeper level; None for the deepest.
            size: Height and width of the teacher's feature.

        Returns:
            Fused map, ``B x M`` x size, and prediction of the teacher's feature, ``B x D`` x size.
        """
        fused = self.enter(feature)
        if self.attention is not None:
            assert deeper is not None
            deeper = F.interpolate(deeper, fused.shape[2:])
            own, other = self.attention(torch.cat([fused, deeper], dim=1)).sigmoid().split(1, dim=1)
            fused = own * fused + other * deeper
        if fused.shape[2:] != torch.Size(size):
            fused = F.interpolate(fused, tuple(size))
        return fused, self.leave(fused)


class ReviewKD(Method):
    """Cross-entropy with the labels plus the hierarchical context loss of fused features.

    Args:
        warmup_epochs: Number of epochs over which the weight of the review grows linearly; the last of them has the
            full weight. 0 for no warm-up. 20 in the authors' code, which starts at 0 and ends one epoch later.
        mid_channels: Channels of the fused maps; None for the width of the student's embedding, at most 512.
        weight_ce: Weight of the cross-entropy; 1 in the authors' code.
        weight_review: Weight of the review; 1 in the authors' code, and up to 8 for some pairs of networks.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        warmup_epochs: NonNegativeInt = 20,
        mid_channels: PositiveInt | None = None,
        weight_ce: NonNegative = 1.0,
        weight_review: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.warmup_epochs, self.mid_channels = warmup_epochs, mid_channels
        self.weight_review = weight_review
        self.loss_weights = {"ce": weight_ce, "review": weight_review}
        self.set_epoch(0)
        self.fusions = nn.ModuleList()

    def build(self, networks: Networks) -> None:
        """Pair the stages and create a fusion for every pair and for the embeddings.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the stages of a network are unknown.
        """
        student, teacher = networks.student, networks.teacher
        self.layers = pair_stages(student, teacher, method="ReviewKD")
        width = require_embedding(student, "the student", "method ReviewKD")
        middle = self.mid_channels or min(WIDEST, width)
        channels = [(ours[0], theirs[0]) for ours, theirs in layer_shapes(self.layers, student, teacher)]
        channels.append((width, require_embedding(teacher, "the teacher", "method ReviewKD")))
        self.fusions = nn.ModuleList(
            Fusion(ours, middle, theirs, deepest=level == len(self.layers))
            for level, (ours, theirs) in enumerate(channels)
        )

    def begin_fit(self, fit: FitInfo) -> None:
        """Say if the fit is shorter than the warm-up.

        Args:
            fit: Information about the fit.
        """
        super().begin_fit(fit)
        tell_if_shorter("ReviewKD", "review", self.warmup_epochs, fit.epochs)

    def set_epoch(self, epoch: int) -> None:
        """Set the weight of the review, which grows during the warm-up.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.loss_weights["review"] = self.weight_review * linear_warmup(epoch, self.warmup_epochs)

    def review(self, student: NetOutput, teacher: NetOutput) -> tuple[list[Tensor], list[Tensor]]:
        """Return the student's predictions of the teacher's features, and these features.

        Args:
            student: Output of the student; gradients flow into its features and embedding.
            teacher: Output of the teacher.

        Returns:
            Predictions and features, each ``B x C x H x W``, from the shallowest level to the embedding.
        """
        ours, theirs = layer_features(self.layers, student, teacher)
        ours = [*ours, embedding_of(student)[:, :, None, None]]
        theirs = [*theirs, embedding_of(teacher)[:, :, None, None]]
        predictions: list[Tensor] = []
        fused: Tensor | None = None
        for fusion, feature, target in zip(reversed(self.fusions), reversed(ours), reversed(theirs), strict=True):
            fused, prediction = fusion(feature, fused, target.shape[2:])
            predictions.insert(0, prediction)
        return predictions, theirs

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``review``; arguments as in the base class."""
        assert teacher is not None
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "review": hcl_loss(*self.review(student, teacher)),
        }
