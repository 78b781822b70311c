r"""BD-KD. Amara, Sepahvand, Meyer, Gross, Clark: Balancing the Divergences for Online KD, 2022 (arXiv:2212.12965).

A student and a peer, in the paper a larger network, are trained together from scratch. The peer learns from the labels
and from the student. The student's loss balances, image by image, the forward divergence from the peer, which makes the
student cover all classes that the peer finds likely, and the reverse one, which makes it commit itself:

* \(L_{balanced} = \tau^2 \left[ a\,\mathrm{KL}(p^t \| p^s) + (1 - a)\,\mathrm{KL}(p^s \| p^t) \right]\), no gradient
  into \(p^t\)
* \(L_{peer} = \tau^2\,\mathrm{KL}(p^s \| p^t)\), no gradient into \(p^s\)
* \(L = w_{ce}\,\mathrm{CE}(p^s, y) + w_{aux}\,\mathrm{CE}(p^t, y) + w_{balanced} L_{balanced} + w_{peer} L_{peer}\)

The full text was not available to us. The abstract and summaries of the paper state the two divergences of the student,
that the gap of the entropies weighs them for each image, and the reverse divergence for the peer. The weight is ours:
\(a = H^t / (H^t + H^s)\) with the entropies of both predictions at temperature \(\tau\). The forward part weighs more
where the student is surer than the peer. Temperature and weights are ours, too, and so is the default peer, a twin of
the student, since no larger network suits every student.
"""

from __future__ import annotations

from torch import Tensor

from ackd_lightning.functional import cross_entropy, entropy, kd_loss, kl_per_image
from ackd_lightning.methods.base import FitInfo, Method
from ackd_lightning.methods.peers import require_networks
from ackd_lightning.models.weight_files import tell
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


def balanced_loss(student_logits: Tensor, peer_logits: Tensor, *, temperature: float) -> Tensor:
    """Return the divergence of every image, forward and reverse in shares by entropy.

    No gradient flows into the peer or the shares.

    Args:
        student_logits: Logits ``B x K`` of the student.
        peer_logits: Logits ``B x K`` of the peer.
        temperature: Temperature tau, above 0.

    Returns:
        ``B`` float32, in nats.

    Examples:
        >>> import torch
        >>> sure, even = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> balanced_loss(sure, even, temperature=1.0)  # almost the forward divergence
        tensor([3.8014])
        >>> balanced_loss(even, sure, temperature=1.0)  # almost the reverse one
        tensor([3.8014])
    """
    peer_logits = peer_logits.detach()
    own, other = (entropy(each.detach(), temperature=temperature) for each in (student_logits, peer_logits))
    share = (other + 1e-12) / (own + other + 2e-12)  # one half where both are sure
    forward, reverse = (
        kl_per_image(student_logits, peer_logits, temperature=temperature, direction=direction)
        for direction in ("forward", "reverse")
    )
    return share * forward + (1 - share) * reverse


class BDKD(Method):
    """Cross-entropies of the student and a peer that learn from each other, balanced for the student.

    Args:
        peer: Network that is trained along: a model name such as ``resnet110``, larger than the student in the paper,
            or ``peer`` for a twin of the student.
        temperature: Temperature tau, above 0.
        weight_ce: Weight of the student's cross-entropy.
        weight_ce_aux: Weight of the peer's cross-entropy.
        weight_balanced: Weight of the student's balanced divergence.
        weight_peer: Weight of the peer's divergence from the student.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> BDKD(peer="resnet110").branches
        ('resnet110',)
    """

    teacher = "none"
    labels = "mixed"

    def __init__(
        self,
        *,
        peer: str = "peer",
        temperature: Positive = 3.0,
        weight_ce: NonNegative = 1.0,
        weight_ce_aux: NonNegative = 1.0,
        weight_balanced: NonNegative = 1.0,
        weight_peer: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.branches = require_networks([peer], "peer", "BDKD")
        self.temperature = temperature
        self.loss_weights = {
            "ce": weight_ce,
            "ce_aux": weight_ce_aux,
            "balanced": weight_balanced,
            "peer": weight_peer,
        }

    def begin_fit(self, fit: FitInfo) -> None:
        """Say that the peer is a twin of the student.

        Args:
            fit: Information about the fit.
        """
        if self.branches == ("peer",):
            tell("the peer of method BDKD is a twin of the student; its argument peer names a larger network")

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``ce_aux``, ``balanced`` and ``peer``; arguments as in the base class."""
        ours, theirs = student.logits, student.branches[0].logits
        return {
            "ce": cross_entropy(ours, batch.labels),
            "ce_aux": cross_entropy(theirs, batch.labels),
            "balanced": balanced_loss(ours, theirs, temperature=self.temperature).mean(),
            "peer": kd_loss(theirs, ours, temperature=self.temperature),
        }
