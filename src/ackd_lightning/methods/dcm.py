r"""DCM. Yao, Sun: Knowledge Transfer via Dense Cross-layer Mutual-distillation, ECCV 2020 (arXiv:2008.07816).

Two networks are trained together from scratch. Each has auxiliary classifiers on its inner stages, so that it predicts
Q + 1 times: \(p_1, \dots, p_Q\) and its own \(p_{Q+1}\). Every classifier of one network learns from all of the other,
whatever their depth:

* \(L_{dense} = \sum_{i,j=1}^{Q+1} \tau^2 \left[ \mathrm{KL}(\bar q_j \| p_i) + \mathrm{KL}(\bar p_i \| q_j) \right]\)
  with the predictions q of the other network; no gradient into those with a bar
* \(L = w_{ce}\,\mathrm{CE}(p_{Q+1}, y) + w_{aux} L_{aux} + w_{dense} L_{dense}\), where \(L_{aux}\) is the sum of the
  cross-entropies of all other classifiers

After the training the auxiliary classifiers are left out. Sum, weights 1 and two auxiliary classifiers, on the input of
the last stage and of the last but one, are those of the authors' code for WRNs. Its file with the divergence was not
available to us; temperature 1, as in DML, is ours. So are the auxiliary classifiers: here each is the rest of the
network with fresh weights, as in ACKD, while the authors give each architecture its own (for WRNs, half as many blocks
in one and twice the width in the other).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss
from ackd_lightning.methods.base import Method
from ackd_lightning.methods.peers import all_logits, require_networks
from ackd_lightning.models.branches import is_branch
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


def dense_loss(first: Sequence[Tensor], second: Sequence[Tensor], *, temperature: float) -> Tensor:
    """Return the divergences between all classifiers of two networks in both directions.

    Args:
        first: Logits ``B x K`` of every classifier of one network.
        second: Logits ``B x K`` of every classifier of the other.
        temperature: Temperature tau, above 0.

    Returns:
        Scalar float32, in nats.

    Examples:
        >>> sure, even = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> dense_loss([sure, even], [even], temperature=1.0)  # both directions of one pair; the other pair is equal
        tensor(0.7616)
    """
    pairs = [
        kd_loss(learner, source, temperature=temperature)
        for ours in first
        for theirs in second
        for learner, source in ((ours, theirs), (theirs, ours))
    ]
    return torch.stack(pairs).sum()


class DCM(Method):
    """Two networks with auxiliary classifiers that all learn from the labels and from those of the other network.

    Args:
        peer: The other network: ``peer`` for the student's structure with new weights, or a model name such as
            resnet110.
        classifiers: Auxiliary classifiers of both networks, ``DnBm`` or, for any number of stages, ``last`` and
            ``last2``, which own the last and the last two stages.
        temperature: Temperature tau, above 0.
        weight_ce: Weight of the student's cross-entropy.
        weight_ce_aux: Weight of all other cross-entropies (their sum).
        weight_dense: Weight of the divergences (their sum).

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> DCM().branches
        ('last2', 'last', 'peer+last2+last')
    """

    teacher = "none"
    labels = "mixed"

    def __init__(
        self,
        *,
        peer: str = "peer",
        classifiers: Sequence[str] = ("last2", "last"),
        temperature: Positive = 1.0,
        weight_ce: NonNegative = 1.0,
        weight_ce_aux: NonNegative = 1.0,
        weight_dense: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        (network,) = require_networks([peer], "peer", "DCM")
        for name in classifiers:
            if not is_branch(name):
                raise ACKDError(f"classifiers names {name!r} in method DCM; name branches, such as last or D2B2")
        if not classifiers:
            raise ACKDError("classifiers is empty in method DCM, which is DML then; name at least one, such as last")
        self.branches = (*classifiers, "+".join((network, *classifiers)))
        self.temperature = temperature
        self.loss_weights = {"ce": weight_ce, "ce_aux": weight_ce_aux, "dense": weight_dense}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``ce_aux`` and ``dense``; arguments as in the base class."""
        *auxiliary, peer = student.branches
        ours, theirs = [student.logits, *(each.logits for each in auxiliary)], all_logits(peer)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "ce_aux": torch.stack([cross_entropy(each, batch.labels) for each in (*ours[1:], *theirs)]).sum(),
            "dense": dense_loss(ours, theirs, temperature=self.temperature),
        }
