r"""SemCKD. Chen et al.: Cross-Layer Distillation with Semantic Calibration, AAAI 2021 (arXiv:2012.03236).

Every stage i of the student learns from every stage j of the teacher. The weight is an attention that each image b
computes from its similarities to the B images of the batch (rows of the Gram matrices of the flattened features F):

\(q_{bi} = \mathrm{norm}(\mathrm{MLP}_i([F^s_i F_i^{s\top}]_b)),\quad
k_{bj} = \mathrm{norm}(\mathrm{MLP}_j([F^t_j F_j^{t\top}]_b)),\quad
\alpha_{bij} = \mathrm{softmax}_j(q_{bi} \cdot k_{bj})\)

\(L = w_{ce}\,\mathrm{CE} + w_{kd}\,L_{KD} + w_{semckd} \frac{1}{B S} \sum_{b,i,j} \alpha_{bij}\,
\mathrm{MSE}(\mathrm{proj}_{ij}(F^s_i)_b, (F^t_j)_b)\)

S is the number of the student's stages; the larger of two maps is pooled to the size of the smaller. The MLPs read one
number per image of the batch, so the batch size is part of the trained method.

The feature of the last stage is the input of global pooling. BatchNorm in the projections uses the batch statistics of
its process, as in the student, and has no running statistics, since a projection is never evaluated.
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
    """Return the inner products of each image's flattened feature with those of the global batch.

    Gradients flow into both factors, also to images of other processes.

    Args:
        feature: Features ``B x C x H x W`` of the images of this process.

    Returns:
        ``B x B'`` float32 with the B' images of all processes in the order of a single process.
    """
    flat = feature.float().flatten(1)
    with torch.autocast(flat.device.type, enabled=False):  # it would round the product to half precision
        return flat @ whole_batch(flat).T


def stage_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the weight of every stage of the teacher for every stage of the student: softmax of inner products.

    Args:
        queries: Unit vectors ``B x S x D`` of the S stages of the student.
        keys: Unit vectors ``B x T x D`` of the T stages of the teacher.

    Returns:
        ``B x S x T`` float32 whose sums over the teacher's stages are 1.
    """
    with torch.autocast(queries.device.type, enabled=False):
        return torch.bmm(queries.float(), keys.float().transpose(1, 2)).softmax(dim=2)


def semckd_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], attention: Tensor) -> Tensor:
    """Return the squared distance of all pairs of stages, weighed by attention.

    Gradients flow into the student's features and the attention, not into the teacher's features.

    Args:
        student_features: S * T maps ``B x C x H x W``, projected to the shape of their partner: the first stage for
            each of the T stages of the teacher, then the second, and so on.
        teacher_features: The S * T partners, pooled where the student's map is smaller.
        attention: Weights ``B x S x T``.

    Returns:
        Scalar float32 in squared units of the teacher's features: mean over the entries of each map, over images and
        over the student's stages.

    Examples:
        >>> student, teacher = [torch.ones(1, 2, 4, 4)] * 2, [torch.zeros(1, 2, 4, 4), torch.full((1, 2, 4, 4), 3.0)]
        >>> semckd_loss(student, teacher, torch.tensor([[[0.5, 0.5]]]))  # mean of 1 and 4
        tensor(2.5000)

    Raises:
        ACKDError: If a pair differs in shape.
    """
    distances = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.shape != teacher.shape:
            raise ACKDError(
                f"semckd_loss got a feature {tuple(student.shape)} of the student and {tuple(teacher.shape)} of the "
                "teacher; project the student's feature and pool the larger map first"
            )
        distances.append((student.float() - teacher.detach().float()).square().flatten(1).mean(dim=1))
    return (attention.float().flatten(1) * torch.stack(distances, dim=1)).sum(dim=1).mean() / attention.shape[1]


class SimilarityEmbedding(nn.Module):
    """MLP from the similarities of an image to a unit vector: a query of the student or a key of the teacher.

    Args:
        batch_size: Number of images in the global batch.
        reduction: Ratio of the batch size to the width of the result; the hidden layer is twice as wide as the result.
    """

    def __init__(self, batch_size: int, reduction: int) -> None:
        super().__init__()
        width = batch_size // reduction
        self.hidden = nn.Linear(batch_size, 2 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, similarity: Tensor) -> Tensor:
        """Embed rows of a similarity matrix in float32, since their entries can exceed a million.

        Args:
            similarity: Similarities ``B x B'``.

        Returns:
            Unit vectors ``B x D``.
        """
        with torch.autocast(similarity.device.type, enabled=False):
            hidden = F.linear(similarity.float(), self.hidden.weight.float(), self.hidden.bias.float()).relu()
            return F.normalize(F.linear(hidden, self.out.weight.float(), self.out.bias.float()), dim=1, eps=1e-6)


def projection(inputs: int, outputs: int) -> nn.Sequential:
    """Return convolutions 1x1, 3x3, 1x1 with BatchNorm and ReLU between them, for one pair of stages.

    Args:
        inputs: Channels of the student's stage.
        outputs: Channels of the teacher's stage.
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

    The MLPs read one number per image of the global batch. All training batches must have the same size, also
    when a run is resumed (data modules of this package leave out the incomplete last batch for this method); the number
    of processes may change. The size comes from the data module or from a checkpoint.

    Args:
        batch_size: Number of images of one step in all processes; None for the data module's ``batch_size``.
        reduction: Ratio of the batch size to the output width of the MLPs.
        temperature: Temperature tau of the distillation term, above 0.
        weight_ce: Weight of the cross-entropy.
        weight_kd: Weight of the distillation term.
        weight_semckd: Weight of the distances; the authors use 400 for CIFAR-100 and 50 for ImageNet.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"
    whole_batches = True
    fit_modules = ("queries", "keys")

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
        self.batch_size = 0  # unknown
        self.queries, self.keys, self.projections = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.stages = (0, 0)

    def build(self, networks: Networks) -> None:
        """Create the projections of all pairs, and the MLPs when the constructor named the batch size.

        Args:
            networks: Shapes and structures of student and teachers.

        Raises:
            ACKDError: If the stages of a network are unknown.
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
            fit: Information about the fit, of which the batch size is read.

        Raises:
            ACKDError: If the batch size is too small, or differs from that of an earlier training.
        """
        size = fit.batch_size
        if size is None or self.given_size is not None or size == self.batch_size:
            return
        if self.batch_size:
            raise ACKDError(
                f"method SemCKD was trained with batches of {self.batch_size} images and the data give {size}; "
                f"set batch_size to {self.batch_size}"
            )
        self._make_embeddings(size)

    def _make_embeddings(self, size: int) -> None:
        if size < self.reduction:
            raise ACKDError(
                f"batch_size is {size} and method SemCKD with reduction {self.reduction} needs at least "
                f"{self.reduction} images in a batch; use larger batches or a smaller reduction"
            )
        self.batch_size = size
        device = next(self.projections.parameters()).device
        self.queries, self.keys = (
            nn.ModuleList(SimilarityEmbedding(size, self.reduction) for _ in range(count)).to(device)
            for count in self.stages
        )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the batch size from the checkpoint, the only source of it outside a fit."""
        stored = state_dict.get(f"{prefix}queries.0.hidden.weight")
        if isinstance(stored, Tensor) and stored.shape[1] != self.batch_size:
            if self.batch_size:
                raise ACKDError(
                    f"the checkpoint's method SemCKD was trained with batches of {stored.shape[1]} images and this one "
                    f"is for {self.batch_size}; set batch_size to {stored.shape[1]}"
                )
            self._make_embeddings(stored.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def attention(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return the attention of every image.

        Args:
            student: Features F_1 .. F_S of the student.
            teacher: Features F_1 .. F_T of the teacher; no gradient flows into them.

        Returns:
            ``B x S x T`` float32.

        Raises:
            ACKDError: If the batch has another size.
        """
        if not self.batch_size:
            raise ACKDError(
                "the batch size is unknown to method SemCKD; pass batch_size to it, or give the data module an "
                "attribute `batch_size`, the number of images of one step in all processes"
            )
        ours = [similarities(feature) for feature in student]
        theirs = [similarities(feature.detach()) for feature in teacher]
        if ours[0].shape[1] != self.batch_size:
            raise ACKDError(
                f"a batch has {ours[0].shape[1]} images in all processes and method SemCKD was built for "
                f"{self.batch_size}; make them equal and let the loader drop the last, smaller batch"
            )
        return stage_attention(
            torch.stack([embed(each) for embed, each in zip(self.queries, ours, strict=True)], dim=1),
            torch.stack([embed(each) for embed, each in zip(self.keys, theirs, strict=True)], dim=1),
        )

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``kd`` and ``semckd``; arguments as in the base class.

        Gradients of ``semckd`` reach the student also through the attention.

        Raises:
            ACKDError: If the batch has another size.
        """
        assert teacher is not None
        ours, theirs = features_of(student)[1:], features_of(teacher)[1:]
        pairs = [same_size(*pair) for pair in itertools.product(ours, theirs)]
        projected = [project(feature) for project, (feature, _) in zip(self.projections, pairs, strict=True)]
        targets = [target for _, target in pairs]
        logits = student.logits if self.loss_weights["kd"] == 0 else teacher.logits  # those may be of other classes
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "kd": kd_loss(student.logits, logits, temperature=self.temperature),
            "semckd": semckd_loss(projected, targets, self.attention(ours, theirs)),
        }
