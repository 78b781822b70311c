r"""SKT. Liu, Chen, Wu, Chen, Li, Lin: Efficient Crowd Counting via Structured Knowledge Transfer, ACM MM 2020.

The paper counts people with density maps; here it is carried over to image classification (arXiv:2003.10120). A 1x1
convolution maps the student's features \(F_n^s\) to the teacher's channels. Two kinds of structure are transferred:

* patterns within a layer: \(L_{pat} = \sum_n \mathrm{mean}_{b,h,w} (1 - \cos(F_{n}^s, F_{n}^t))\), the cosine over the
  channels at every position
* relations between layers: \(G_{nm} = \frac{1}{HW} \sum_{h,w} \hat F_{n}\,\hat F_{m}^T\) of all pairs of layers n < m,
  with maps that are max-pooled to the smallest one and standardised over the positions of every channel (maps of one
  position are left out, as nothing is left of them then);
  \(L_{rel} = \sum_{n<m} \mathrm{mean}\,(G^s_{nm} - G^t_{nm})^2\)

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{kd}\,\tau^2 \mathrm{KL}(p^t \| p^s) + w_{pat} L_{pat} + w_{rel} L_{rel}\)

Cosine, relations, pooling and standardisation are those of the authors' code. Ours, for classification: cross-entropy
and KL (\(\tau = 4\)) in place of squared distances of density maps from the labels' and the teacher's; the stages of
any two networks in place of seven layers of CSRNet; and means over positions, images and entries in place of sums over
one image at a time. With means the authors' weights (0.5 for both kinds) have another meaning; all weights are 1 here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.functional import cross_entropy, kd_loss
from ackd_lightning.methods.base import Method, Networks
from ackd_lightning.methods.pairing import layer_features, layer_shapes, pair_stages, same_size
from ackd_lightning.models.weight_files import tell
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


def pattern_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Return 1 minus the cosine over the channels, mean over images and positions. No gradient flows into the teacher.

    Args:
        student_feature: Feature map ``B x C x H x W``.
        teacher_feature: Feature map ``B x C x H x W``.

    Returns:
        Scalar float32, from 0 to 2.

    Examples:
        >>> student = torch.tensor([[[[3.0, 1.0]], [[0.0, 0.0]]]])
        >>> teacher = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> pattern_loss(student, teacher)  # parallel at the first position, orthogonal at the second
        tensor(0.5000)
    """
    return (1 - F.cosine_similarity(student_feature.float(), teacher_feature.detach().float(), dim=1)).mean()


def relations(features: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
    """Return the correlations of the channels of every two layers.

    Args:
        features: Feature maps ``B x C_n x H_n x W_n``; gradients flow into them.
        size: Height and width to which the maps are max-pooled.

    Returns:
        ``B x C_n x C_m`` float32 of every two layers n < m; zero where a channel is constant.

    Examples:
        >>> first, second = torch.tensor([[[[0.0, 4.0]]]]), torch.tensor([[[[1.0, -1.0]], [[2.0, 9.0]]]])
        >>> relations([first, second], (1, 2))[0].round(decimals=3)
        tensor([[[-1.,  1.]]])
    """
    if len(features) < 2:
        return []
    standard = []
    for each in features:
        flat = F.adaptive_max_pool2d(each.float(), tuple(size)).flatten(2)
        centred = flat - flat.mean(dim=2, keepdim=True)
        standard.append(centred * (centred.square().mean(dim=2, keepdim=True) + 1e-5).rsqrt())
    with torch.autocast(features[0].device.type, enabled=False):  # it would round the products to half precision
        return [ours @ theirs.transpose(1, 2) / ours.shape[2] for ours, theirs in combinations(standard, 2)]


class SKT(Method):
    """Cross-entropy plus KD, patterns within layers and relations between layers.

    Args:
        temperature: Temperature tau of the distillation of the logits; ours.
        weight_ce: Weight of the cross-entropy; 1 in the authors' code for its counterpart.
        weight_kd: Weight of the distillation of the logits; 1 in the authors' code for its counterpart.
        weight_patterns: Weight of the patterns; ours.
        weight_relations: Weight of the relations; ours. As in the authors' code, equal to that of the patterns.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        temperature: Positive = 4.0,
        weight_ce: NonNegative = 1.0,
        weight_kd: NonNegative = 1.0,
        weight_patterns: NonNegative = 1.0,
        weight_relations: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.loss_weights = {
            "ce": weight_ce,
            "kd": weight_kd,
            "patterns": weight_patterns,
            "relations": weight_relations,
        }
        self.adapters = nn.ModuleList()
        self.size = (1, 1)
        self.related: list[int] = []

    def build(self, networks: Networks) -> None:
        """Pair the stages and create a convolution for each of the student's.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the stages of a network are unknown.
        """
        student, teacher = networks.student, networks.teacher
        self.layers = pair_stages(student, teacher, method="SKT")
        shapes = layer_shapes(self.layers, student, teacher)
        self.adapters = nn.ModuleList(nn.Conv2d(ours[0], theirs[0], 1) for ours, theirs in shapes)
        wide = [pair for pair in shapes if all(shape[1] * shape[2] > 1 for shape in pair)]
        self.related = [number for number, pair in enumerate(shapes) if pair in wide]
        if len(self.related) < 2:
            tell("SKT: fewer than two pairs of stages have maps of more than one position, so `relations` is 0")
        elif left := len(shapes) - len(wide):
            tell(f"SKT: `relations` leaves out {left} of {len(shapes)} pairs of stages, whose maps have one position")
        every = [shape for pair in wide for shape in pair] or [(1, 1, 1)]
        self.size = (min(shape[1] for shape in every), min(shape[2] for shape in every))

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``kd``, ``patterns`` and ``relations``; arguments as in the base class."""
        assert teacher is not None
        ours, theirs = layer_features(self.layers, student, teacher)
        ours = [adapter(each) for adapter, each in zip(self.adapters, ours, strict=True)]
        patterns = [pattern_loss(*same_size(*pair)) for pair in zip(ours, theirs, strict=True)]
        mine, given = ([each[number] for number in self.related] for each in (ours, theirs))
        pairs = zip(relations(mine, self.size), relations([each.detach() for each in given], self.size), strict=True)
        distances = [F.mse_loss(*pair) for pair in pairs]
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "kd": kd_loss(student.logits, teacher.logits, temperature=self.temperature),
            "patterns": torch.stack(patterns).sum(),
            "relations": torch.stack([*distances, student.logits.new_zeros((), dtype=torch.float32)]).sum(),
        }
