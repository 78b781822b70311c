r"""DPK. Qiu, Ma, Yang, Liu, Hou, Yi, Ouyang: Better Teacher Better Student: Dynamic Prior Knowledge, ICLR 2023.

Before the student's feature map is compared with the teacher's, a part of it is replaced by the teacher's own: the
prior knowledge (arXiv:2206.06067). The part is large while the two networks see images differently. For a pair of
stages with encoders E, a decoder D and random masks M of the positions of every image:

\(H = M \circ E_t(F^t) + (1 - M) \circ E_s(F^s),\quad L_{prior} = \sum_{(n,m)} \mathrm{mean}\,(D(H) - F^t)^2\)

\(P(M = 1) = 1 - \mathrm{CKA}(F^s, F^t)\)

with the CKA of the batch. \(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{prior} L_{prior}\). No gradient flows through the CKA.

The full text was not available to us. The abstract, and what others write about the paper, describe this much: masks
that stitch both maps together, an encoder and a decoder, the teacher's map as target, and the share by CKA; the
authors' repository has no code. Ours:

* the networks: a 1x1 convolution with BatchNorm as encoder of each side and two 3x3 convolutions with BatchNorm and a
  1x1 convolution as decoder, so that a position is filled in from its neighbours
* CKA with a linear kernel and the unbiased estimate of HSIC (Song et al. 2012), cut off at 0: in a batch that is
  smaller than the features have entries, the biased estimate is near 1 for any two networks; in a batch of fewer than
  4 images, which the last one of an epoch may be, there is no estimate and the whole map is the teacher's
* all pairs of stages, a mask for each image, and both weights, which are 1; ``--config dpk+kd`` adds KD
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.functional import cross_entropy, whole_batch
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.methods.pairing import layer_features, layer_shapes, pair_stages, same_size
from ackd_lightning.random import image_keys, stateless_bits, stateless_uniform
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative

_STREAM = 0x44504B  # keeps these masks apart from all other random numbers
_FEWEST = 4  # images that the estimate of HSIC needs


@torch.no_grad()
def unbiased_cka(first: Tensor, second: Tensor) -> Tensor:
    r"""Return the linear CKA of two sets of features of the same images, from unbiased estimates of HSIC.

    \(\mathrm{HSIC}_1(K, L) = \frac{1}{n (n - 3)} \left(\mathrm{tr}(KL) + \frac{1^T K 1\,1^T L 1}{(n - 1)(n - 2)} -
    \frac{2}{n - 2} 1^T K L 1\right)\) of Gram matrices whose diagonals are set to 0.

    Args:
        first: Features ``B x ...``.
        second: Features ``B x ...``.

    Returns:
        Scalar float32 in [0, 1], without gradient; 0 where a set of features does not vary, and for fewer than 4
        images, for which the estimate is not defined.

    Examples:
        >>> features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
        >>> unbiased_cka(features, 2 * features + 1)
        tensor(1.)
    """
    if len(first) < _FEWEST:
        return torch.zeros((), device=first.device)

    def gram(features: Tensor) -> Tensor:
        flat = features.float().flatten(1)
        flat = flat - flat.mean(dim=0)  # changes nothing but rounding
        flat = flat / flat.abs().amax().clamp_min(1e-30)
        product = (flat @ flat.T).fill_diagonal_(0)
        return product if product.device.type == "mps" else product.double()  # MPS has no float64

    def hsic(one: Tensor, other: Tensor) -> Tensor:
        count = len(one)
        sums = one.sum() * other.sum() / ((count - 1) * (count - 2))
        return (one * other).sum() + sums - 2 / (count - 2) * (one.sum(dim=0) * other.sum(dim=0)).sum()

    with torch.autocast(first.device.type, enabled=False):
        one, other = gram(first), gram(second)
    scale = (hsic(one, one).clamp_min(0) * hsic(other, other).clamp_min(0)).sqrt()
    cka = torch.where(scale > 1e-30, hsic(one, other) / scale.clamp_min(1e-30), 0.0)
    return cka.clamp(0, 1).float()


def prior_mask(share: Tensor, keys: Tensor, height: int, width: int) -> Tensor:
    """Return which positions are the teacher's.

    Args:
        share: Probability of every position, a scalar.
        keys: Random bits of every image, ``B`` int64.
        height: Height H of the maps.
        width: Width W of the maps.

    Returns:
        ``B x 1 x H x W`` bool.
    """
    position = torch.arange(height * width, device=keys.device)
    return (stateless_uniform(keys[:, None], position[None, :]) < share).view(-1, 1, height, width)


class PriorDecoder(nn.Module):
    """Encoders of both maps of a pair, and a decoder of the map that is stitched together of them.

    Args:
        ours: Channels of the student's map.
        theirs: Channels of the teacher's map.
    """

    def __init__(self, ours: int, theirs: int) -> None:
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, theirs, track_running_stats=False)
        self.student = nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), norm())
        self.teacher = nn.Sequential(nn.Conv2d(theirs, theirs, 1, bias=False), norm())
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(theirs, theirs, 3, padding=1, bias=False), norm(), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(theirs, theirs, 1))

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the prediction of the teacher's map.

        Args:
            student: Feature map ``B x C x H x W``.
            teacher: Feature map ``B x C' x H x W``.
            mask: Positions at which the teacher's map is read, ``B x 1 x H x W`` bool.

        Returns:
            ``B x C' x H x W``.
        """
        predicted: Tensor = self.decoder(torch.where(mask, self.teacher(teacher), self.student(student)))
        return predicted


class DPK(Method):
    """Cross-entropy plus distance from the teacher's maps, of which the student's decoder is given a part.

    Args:
        weight_ce: Weight of the cross-entropy; ours.
        weight_prior: Weight of the distance; ours.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"
    random_by_index = True

    def __init__(self, *, weight_ce: NonNegative = 1.0, weight_prior: NonNegative = 1.0) -> None:
        super().__init__()
        self.loss_weights = {"ce": weight_ce, "prior": weight_prior}
        self.decoders = nn.ModuleList()
        self.seed = self.epoch = 0

    def build(self, networks: Networks) -> None:
        """Pair the stages and create encoders and a decoder for every pair.

        Args:
            networks: Shapes of student and teacher.

        Raises:
            ACKDError: If the stages of a network are unknown.
        """
        student, teacher = networks.student, networks.teacher
        self.layers = pair_stages(student, teacher, method="DPK")
        shapes = layer_shapes(self.layers, student, teacher)
        self.decoders = nn.ModuleList(PriorDecoder(ours[0], theirs[0]) for ours, theirs in shapes)

    def begin_fit(self, fit: FitInfo) -> None:
        """Store the seed of the masks.

        Args:
            fit: Information about the fit.
        """
        self.seed = fit.seed

    def set_epoch(self, epoch: int) -> None:
        """Store the epoch, which the masks depend on.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = epoch

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return ``ce``, and ``prior`` with the CKA of the global batch; arguments as in the base class."""
        assert teacher is not None
        losses = []
        pairs = zip(self.decoders, *layer_features(self.layers, student, teacher), strict=True)
        for number, (decoder, ours, theirs) in enumerate(pairs):
            ours, theirs = same_size(ours, theirs.detach())
            every, aims = whole_batch(ours.detach()), whole_batch(theirs)
            keys = stateless_bits(_STREAM, self.seed, self.epoch, number, image_keys(batch.index))
            mask = prior_mask(1 - unbiased_cka(every, aims), keys, *ours.shape[2:])
            losses.append(F.mse_loss(decoder(ours, theirs, mask).float(), theirs.float()))
        return {"ce": cross_entropy(student.logits, batch.labels), "prior": torch.stack(losses).sum()}
