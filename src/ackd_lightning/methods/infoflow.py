r"""InfoFlow. Passalis, Tzelepi, Tefas: Heterogeneous Knowledge Distillation using Information Flow Modeling, CVPR 2020.

Every layer turns the images of a batch into distributions over each other, once for each of two kernels K of the
flattened features x (arXiv:2005.00727):

\(p_{ij} = K(x_i, x_j) / \sum_k K(x_i, x_k)\),
\(\quad K_{cos}(a, b) = \tfrac12 (\cos(a, b) + 1)\),
\(\quad K_T(a, b) = 1 / (1 + \|a - b\|)\)

The student imitates the flow of information through the teacher's layers, with Jeffreys divergence
\(J = \sum_j (p^t_{ij} - p^s_{ij}) (\log p^t_{ij} - \log p^s_{ij})\), mean over the images i and summed over the
kernels:

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{flow} J_{embedding} + w_{layers}\,\gamma^{e} \sum_{(n,m)} J_{F_n^s, F_m^t}\)

The weight of the layers is large in the first epochs, when a network forms its critical connections, and decays with
the epoch e; from 1e-6 downwards it is 0 here, and the layers are no longer compared. Kernels, divergence, the ratio of
the two weights (1 to 100) and the decay \(\gamma\) 0.7 are those of the authors' code. Ours: the cross-entropy, since
the authors train without labels for 50 epochs of Adam and measure retrieval, which also makes the scale of their loss
(a mean over i and j) immaterial; `pair_stages` in place of layers named by hand; kernels below 1e-6 count as 1e-6, so
that opposite features stay finite. Their auxiliary teacher, of the student's architecture with wider layers, is a run
of its own here (`ackd reproduce`, row ``takd``, for KD).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.functional import cross_entropy, whole_batch
from ackd_lightning.methods.base import Method, Networks, embedding_of
from ackd_lightning.methods.pairing import layer_features, pair_stages
from ackd_lightning.models.features import require_embedding
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import Fraction, NonNegative

_EPS = 1e-6  # the authors'
_NIL = 1e-6  # smaller weights count as 0: the term would change the loss by less than its rounding does


def log_similarities(feature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of every image given every other, by the cosine and by the Student-t kernel.

    Args:
        feature: Features ``B x ...``; gradients flow into them.

    Returns:
        Two matrices ``B x B`` float32; the exponentials of each row sum to 1. A zero feature has no direction, and no
        gradient of the cosine.

    Examples:
        >>> cosine, student_t = log_similarities(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> cosine.exp()  # 1 and 1/2, divided by their sum
        tensor([[0.6667, 0.3333],
                [0.3333, 0.6667]])
        >>> student_t.exp()[0]  # 1 / 1.001 and 1 / 2.414
        tensor([0.7069, 0.2931])
    """
    with torch.autocast(feature.device.type, enabled=False):  # it would round the products to half precision
        flat = feature.float().flatten(1)
        length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        unit = torch.where(length > _EPS, flat, 0.0) / (length + _EPS)
        cosine = (unit @ unit.T + 1) / 2
        student_t = 1 / (1 + (_squared_distances(flat) + _EPS).sqrt())
    logs = [kernel.clamp_min(_EPS).log() for kernel in (cosine, student_t)]
    return F.log_softmax(logs[0], dim=1), F.log_softmax(logs[1], dim=1)


def _squared_distances(flat: Tensor) -> Tensor:
    """Return the squared distances ``B x B`` of the rows of ``B x D``.

    The values are sums of squared differences, exact for equal and close rows. Their gradient would need B x B x D
    numbers on a GPU; that of the Gram matrix is the same and needs B x B. Equal rows have no gradient, as rounding of
    the Gram matrix, times the steep kernel at distance 0, would be all of it.
    """
    with torch.no_grad():
        exact = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    if not flat.requires_grad:
        return exact
    centred = flat - flat.detach().mean(dim=0)
    lengths = centred.square().sum(dim=1)
    sums = lengths[:, None] + lengths
    gram = sums - 2 * centred @ centred.T
    return exact + torch.where(exact > 1e-12 * sums, gram - gram.detach(), 0.0)


def infoflow_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Return Jeffreys divergence of the similarities, mean over the images, summed over both kernels.

    The shapes of the features may differ. No gradient flows into the teacher. The value depends on the images of the
    batch: with several processes gather them first (``whole_batch``), as `InfoFlow` does.

    Args:
        student_feature: Features ``B x ...`` of the student.
        teacher_feature: Features ``B x ...`` of the teacher.

    Returns:
        Scalar float32, in nats.
    """
    total = student_feature.new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(log_similarities(student_feature), log_similarities(teacher_feature.detach()), strict=True):
        total = total + ((theirs.exp() - ours.exp()) * (theirs - ours)).sum(dim=1).mean()
    return total


class InfoFlow(Method):
    """Cross-entropy plus divergence of the similarities of images, in the embedding and, at first, in every layer.

    Args:
        decay: Factor gamma of the layers' weight after every epoch; 0.7 in the authors' code.
        weight_ce: Weight of the cross-entropy; ours, since the authors train without labels.
        weight_flow: Weight of the divergence of the embeddings; 1 in the authors' code.
        weight_layers: Weight of the divergences of all stages in the first epoch; 100 in the authors' code.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        decay: Fraction = 0.7,
        weight_ce: NonNegative = 1.0,
        weight_flow: NonNegative = 1.0,
        weight_layers: NonNegative = 100.0,
    ) -> None:
        super().__init__()
        self.decay, self.weight_layers = decay, weight_layers
        self.loss_weights = {"ce": weight_ce, "flow": weight_flow, "layers": weight_layers}

    def build(self, networks: Networks) -> None:
        """Pair the stages.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the stages of a network are unknown.
        """
        student, teacher = networks.student, networks.teacher
        self.layers = pair_stages(student, teacher, method="InfoFlow")
        require_embedding(student, "the student", "method InfoFlow")
        require_embedding(teacher, "the teacher", "method InfoFlow")

    def set_epoch(self, epoch: int) -> None:
        """Set the weight of the layers, which decays; below 1e-6 it is 0.

        Args:
            epoch: Number of the epoch, from 0.
        """
        weight = self.weight_layers * self.decay**epoch
        self.loss_weights["layers"] = weight if weight >= _NIL else 0.0

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return ``ce``, and ``flow`` and ``layers`` of the global batch; arguments as in the base class.

        ``layers`` is 0 and takes no time once its weight is 0.
        """
        assert teacher is not None
        layers = [torch.zeros((), device=student.logits.device)]
        if self.loss_weights["layers"]:
            pairs = zip(*layer_features(self.layers, student, teacher), strict=True)
            layers += [infoflow_loss(whole_batch(ours), whole_batch(theirs)) for ours, theirs in pairs]
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "flow": infoflow_loss(whole_batch(embedding_of(student)), whole_batch(embedding_of(teacher))),
            "layers": torch.stack(layers).sum(),
        }
