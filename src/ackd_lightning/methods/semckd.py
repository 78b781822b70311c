r"""SemCKD. Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021 (arXiv:2012.03236).

Every stage i of the student learns from every stage j of the teacher. How much, is attention that each image b computes
from its similarities to the B images of the batch (rows of the Gram matrices of the stages' flattened features F):

\(q_{bi} = \mathrm{norm}(\mathrm{MLP}_i([F^s_i F_i^{s\top}]_b)),\quad
k_{bj} = \mathrm{norm}(\mathrm{MLP}_j([F^t_j F_j^{t\top}]_b)),\quad
\alpha_{bij} = \mathrm{softmax}_j(q_{bi} \cdot k_{bj})\)

\(L = w_{ce}\,\mathrm{CE} + w_{kd}\,L_{KD} + w_{semckd} \frac{1}{B S} \sum_{b,i,j} \alpha_{bij}\,
\mathrm{MSE}(\mathrm{proj}_{ij}(F^s_i)_b, (F^t_j)_b)\)

S is the number of the student's stages; the larger of two maps is pooled to the size of the smaller. The MLPs read as
many numbers as a batch has images, so the batch size is a part of the trained method.

The last stage's feature is the one that pooling sees. BatchNorm in the projections takes the statistics of each
process's own batch, as the student's does, and keeps no running ones, since a projection is never evaluated.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss, whole_batch
from ackd_lightning.methods.base import FitInfo, Method, Networks, features_of
from ackd_lightning.methods.pairing import same_size
from ackd_lightning.models.features import require_stages
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive, PositiveInt


def similarities(feature: Tensor) -> Tensor:
    """Inner products of each image's flattened feature with those of the global batch.

    The gradient flows into both sides, also to other processes' images.

    Args:
        feature: ``B x C x H x W``, of this process's images.

    Returns:
        ``B x B'`` float32 with the B' images of all processes in the order that one process would have.
    """
    flat = feature.float().flatten(1)
    with torch.autocast(flat.device.type, enabled=False):  # it would round the product to half precision
        return flat @ whole_batch(flat).T


def stage_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Weight of every stage of the teacher for every stage of the student: softmax of inner products.

    Args:
        queries: ``B x S x D``, of S stages of the student, of unit length.
        keys: ``B x T x D``, of T stages of the teacher, of unit length.

    Returns:
        ``B x S x T`` float32; sums over the teacher's stages are 1.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return torch.bmm(queries.float(), keys.float().transpose(1, 2)).softmax(dim=2)


def semckd_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], attention: Tensor) -> Tensor:
    """Squared distance of all pairs of stages, weighed by attention.

    The gradient flows into the student's features and the attention, not into the teacher's features.

    Args:
        student_features: S * T maps ``B x C x H x W``, projected to the shape of their partner: the first stage with
            the T stages of the teacher, then the second, and so on.
        teacher_features: as many maps, pooled where the student's are smaller.
        attention: ``B x S x T``.

    Returns:
        Scalar float32 in squared units of the teacher's features: mean over each map's entries, over images and over
        the student's stages.

    Raises:
        ACKDError: when a pair differs in shape.
    """
    distances = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.shape != teacher.shape:
            raise ACKDError(
                f"semckd_loss got a feature {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the "
                "teacher; project the student's and pool the larger first"
            )
        distances.append((student.float() - teacher.detach().float()).square().flatten(1).mean(dim=1))
    return (attention.float().flatten(1) * torch.stack(distances, dim=1)).sum(dim=1).mean() / attention.shape[1]


class SimilarityEmbedding(nn.Module):
    """MLP from an image's similarities to a unit vector: queries of the student's, keys of the teacher's stages.

    Args:
        batch_size: images in the global batch.
        reduction: the result has ``batch_size // reduction`` numbers, the hidden layer twice as many.
    """

    def __init__(self, batch_size: int, reduction: int) -> None:
        super().__init__()
        width = batch_size // reduction
        self.hidden = nn.Linear(batch_size, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, similarity: Tensor) -> Tensor:
        """Embed rows of a similarity matrix, in float32: their entries go into the millions.

        Args:
            similarity: ``B x B'``.

        Returns:
            ``B x D`` of unit length.
        """
        with torch.autocast(similarity.device.type, enabled=False):
            hidden = F.linear(similarity.float(), self.hidden.weight.float(), self.hidden.bias.float()).relu()
            return F.normalize(F.linear(hidden, self.out.weight.float(), self.out.bias.float()), dim=1, eps=1e-6)


def projection(inputs: int, outputs: int) -> nn.Sequential:
    """Convolutions 1x1, 3x3, 1x1 with BatchNorm and ReLU between them, from the student's to the teacher's channels.

    Args:
        inputs: channels of the student's stage.
        outputs: channels of the teacher's stage.
    """
    middle = 2 * outputs
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1, bias=False),
        nn.BatchNorm2d(middle, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(middle, middle, 3, padding=1, bias=False),
        nn.BatchNorm2d(middle, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(middle, outputs, 1, bias=False),
    )


class SemCKD(Method):
    """Cross-entropy, plain distillation, and attention-weighted distances between all pairs of stages.

    The batch size is a part of the method: its MLPs read one number per image of the global batch, so all training
    batches must have that size (data modules here drop the last, smaller batch), a run goes on with the same size only,
    and the number of processes may change. The size comes from the data module, or from a checkpoint.

    Args:
        batch_size: images of one step in all processes together; None: the data module's ``batch_size``.
        reduction: the MLPs' output is so many times smaller than the batch.
        temperature: tau of the distillation term, > 0.
        weight_ce: weight of the cross-entropy.
        weight_kd: weight of the distillation term.
        weight_semckd: weight of the distances; the authors take 400 for CIFAR-100 and 50 for ImageNet.

    Raises:
        ACKDError: for arguments out of range.
    """

    def __init__(
        self,
        *,
        batch_size: PositiveInt | None = None,
        reduction: PositiveInt = 4,
        temperature: Positive = 4.0,
        weight_ce: NonNegative = 1.0,
        weight_kd: NonNegative = 1.0,
        weight_semckd: NonNegative = 400.0,
    ) -> None:
        super().__init__()
        self.given_size, self.reduction, self.temperature = batch_size, reduction, temperature
        self.loss_weights = {"ce": weight_ce, "kd": weight_kd, "semckd": weight_semckd}
        self.batch_size = 0  # not known
        self.queries, self.keys, self.projections = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.stages = (0, 0)

    def build(self, networks: Networks) -> None:
        """Make the projections of all pairs, and the MLPs when the batch size was given.

        Args:
            networks: Shapes and structures of student and teachers.

        Raises:
            ACKDError: when the stages of a network are not known.
        """
        student, teacher = networks.student, networks.teacher
        ours = require_stages(student, "the student", "method SemCKD")
        theirs = require_stages(teacher, "the teacher", "method SemCKD")
        self.stages = len(ours) - 1, len(theirs) - 1
        self.layers = tuple(itertools.product(range(1, self.stages[0] + 1), range(1, self.stages[1] + 1)))
        self.projections = nn.ModuleList(projection(ours[first][0], theirs[second][0]) for first, second in self.layers)
        if self.given_size is not None:
            self._make_embeddings(self.given_size)

    def begin_fit(self, fit: FitInfo) -> None:
        """Create the MLPs for the data's batch size, unless the constructor named one.

        Args:
            fit: Its batch size is read.

        Raises:
            ACKDError: when it is too small, or the MLPs were trained with another one.
        """
        size = fit.batch_size
        if size is None or self.given_size is not None or size == self.batch_size:
            return
        if self.batch_size:
            raise ACKDError(
                f"method SemCKD was trained with batches of {self.batch_size} images and the data give {size}; "
                f"go on with batch_size {self.batch_size}"
            )
        self._make_embeddings(size)

    def _make_embeddings(self, size: int) -> None:
        if size < self.reduction:
            raise ACKDError(
                f"batch_size is {size} and method SemCKD with reduction {self.reduction} needs {self.reduction} images "
                "in a batch or more; take larger batches"
            )
        self.batch_size = size
        device = next(self.projections.parameters()).device
        self.queries, self.keys = (
            nn.ModuleList(SimilarityEmbedding(size, self.reduction) for _ in range(count)).to(device)
            for count in self.stages
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the batch size from the checkpoint: without a fit nobody else knows it."""
        stored = state_dict.get(f"{prefix}queries.0.hidden.weight")
        if isinstance(stored, Tensor) and stored.shape[1] != self.batch_size:
            if self.batch_size:
                raise ACKDError(
                    f"the checkpoint's method SemCKD was trained with batches of {stored.shape[1]} images and this one "
                    f"is for {self.batch_size}; go on with batch_size {stored.shape[1]}"
                )
            self._make_embeddings(stored.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def attention(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Attention of every image.

        Args:
            student: F_1 .. F_S.
            teacher: F_1 .. F_T; no gradient flows into it.

        Returns:
            ``B x S x T`` float32.

        Raises:
            ACKDError: for a batch of another size.
        """
        if not self.batch_size:
            raise ACKDError(
                "method SemCKD does not know the batch size; give its argument batch_size, or the data module an "
                "attribute `batch_size`, as the number of images of one step in all processes together"
            )
        ours = [similarities(feature) for feature in student]
        theirs = [similarities(feature.detach()) for feature in teacher]
        if ours[0].shape[1] != self.batch_size:
            raise ACKDError(
                f"a batch has {ours[0].shape[1]} images in all processes together and method SemCKD is made for "
                f"batch_size {self.batch_size}; make them equal, and let the loader drop the last, smaller batch"
            )
        return stage_attention(
            torch.stack([embed(each) for embed, each in zip(self.queries, ours, strict=True)], dim=1),
            torch.stack([embed(each) for embed, each in zip(self.keys, theirs, strict=True)], dim=1),
        )

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Terms ``ce``, ``kd`` and ``semckd``; arguments as in the base class.

        ``semckd`` reaches the student also through the attention.

        Raises:
            ACKDError: for a batch of another size.
        """
        assert teacher is not None
        ours, theirs = features_of(student)[1:], features_of(teacher)[1:]
        pairs = [same_size(*pair) for pair in itertools.product(ours, theirs)]
        projected = [project(feature) for project, (feature, _) in zip(self.projections, pairs, strict=True)]
        targets = [target for _, target in pairs]
        return {
            "ce": cross_entropy(student.logits, batch.target),
            "kd": kd_loss(student.logits, teacher.logits, temperature=self.temperature),
            "semckd": semckd_loss(projected, targets, self.attention(ours, theirs)),
        }
