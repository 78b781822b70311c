r"""ONE. Lan, Zhu, Gong: Knowledge Distillation by On-the-Fly Native Ensemble, 2018.

The method has no teacher. The last stage of the student exists M + 1 times: in the target learner, which is kept (the
paper's branch 1), and in each of M auxiliary learners. For every image a gate weighs their logits by the feature F that
they share, the input of the last stage:

* \(g = \mathrm{softmax}(\mathrm{ReLU}(\mathrm{BN}(W\,\mathrm{GAP}(F))))\) and
  \(z^e = \sum_k g_k z^{(k)}\) (Eq. 3 of that paper)
* \(L = \mathrm{CE}(z^s, y) + \sum_{aux} \mathrm{CE}(z^{(k)}, y) + \mathrm{CE}(z^e, y)
  + r(e)\,\tau^2 \sum_k \mathrm{KL}(p^e \| p^{(k)})\), the last sum over the target and all auxiliary learners

with \(r(e) = \exp(-5 (1 - e / 80)^2)\) in epoch e < 80, from 0, and 1 from there on; each term has a weight of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ackd_lightning.functional import cross_entropy, kd_loss, weighted_logits, whole_batch
from ackd_lightning.methods.base import Method, Networks, features_of
from ackd_lightning.methods.peers import all_logits
from ackd_lightning.models.features import pooled, require_stages
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, NonNegativeInt, Positive, PositiveInt


def one_loss(logits: Sequence[Tensor], ensemble_logits: Tensor, *, temperature: float) -> Tensor:
    r"""Return the distillation of the ensemble into each learner.

    \(\tau^2 \sum_k \mathrm{KL}(p^e \| p^{(k)})\), mean over the batch. No gradient flows into the ensemble.

    Args:
        logits: Logits ``B x K`` of every learner.
        ensemble_logits: Logits ``B x K`` of the ensemble.
        temperature: Temperature tau, above 0.

    Returns:
        Scalar float32, in nats.

    Examples:
        >>> learners = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])]
        >>> one_loss(learners, torch.tensor([[1.0, 0.0]]), temperature=3.0)
        tensor(0.2422)
    """
    return torch.stack([kd_loss(each, ensemble_logits, temperature=temperature) for each in logits]).sum()


class Gate(nn.Module):
    """Gate that weighs the learners for every image by the feature that they share.

    In training mode the scores are normalised over the global batch of all processes. ``forward`` does not change the
    running statistics; ``remember`` updates them.

    Args:
        channels: Channels C of the shared feature.
        learners: Number of learners.
    """

    def __init__(self, channels: int, learners: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, learners, bias=False)  # the normalisation would remove a bias
        self.norm = nn.BatchNorm1d(learners)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the weight of every learner for every image.

        Args:
            feature: Feature map ``B x C x H x W``; gradients flow into it.

        Returns:
            ``B x L`` float32 whose rows sum to 1.
        """
        scores: Tensor = self.score(pooled(feature)).float()
        if not self.training:
            normal: Tensor = self.norm(scores.to(self.norm.weight.dtype)).float()
        else:
            everyone = whole_batch(scores)
            centre, variance = everyone.mean(dim=0), everyone.var(dim=0, unbiased=False)
            normal = (scores - centre) * (variance + self.norm.eps).rsqrt() * self.norm.weight + self.norm.bias
        return normal.relu().softmax(dim=1)

    def remember(self, feature: Tensor) -> None:
        """Update the running mean and variance of the scores; a single image, which has no variance, is ignored.

        Args:
            feature: Feature map ``B x C x H x W``.
        """
        scores = whole_batch(self.score(pooled(feature)).float())
        if self.training and len(scores) > 1:
            self.norm(scores.to(self.norm.weight.dtype))


class ONE(Method):
    """Learners on the student's last stage and their gated ensemble, which teaches each of them.

    Args:
        learners: Number of auxiliary learners, each with its own last stage and classifier. 2 are the paper's 3
            branches.
        temperature: Temperature tau; 3 in the paper.
        ramp_epochs: Number of epochs over which the weight of ``one`` grows along a Gaussian from exp(-5) to 1; 0 for
            the full weight from the start.
        weight_ce: Weight of the target learner's cross-entropy.
        weight_ce_aux: Weight of the auxiliary learners' cross-entropies (their sum).
        weight_ce_ensemble: Weight of the ensemble's cross-entropy, from which the gate learns.
        weight_one: Weight of the distillation after the ramp.

    Raises:
        ACKDError: If a value is not allowed.
    """

    teacher = "none"
    labels = "mixed"

    def __init__(
        self,
        *,
        learners: PositiveInt = 2,
        temperature: Positive = 3.0,
        ramp_epochs: NonNegativeInt = 80,
        weight_ce: NonNegative = 1.0,
        weight_ce_aux: NonNegative = 1.0,
        weight_ce_ensemble: NonNegative = 1.0,
        weight_one: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.branches = ("last",) * learners
        self.temperature, self.ramp_epochs, self.weight_one = temperature, ramp_epochs, weight_one
        self.loss_weights = {
            "ce": weight_ce,
            "ce_aux": weight_ce_aux,
            "ce_ensemble": weight_ce_ensemble,
            "one": weight_one,
        }
        self.gate: nn.Module = nn.Identity()

    def build(self, networks: Networks) -> None:
        """Create the gate.

        Args:
            networks: Shapes and structures of student and teachers.
        """
        features = require_stages(networks.student, "the student", "method ONE")
        self.gate = Gate(features[-2][0], 1 + len(networks.student.branches))

    def set_epoch(self, epoch: int) -> None:
        """Set the weight of ``one``, which grows along the ramp.

        Args:
            epoch: Number of the epoch, from 0.
        """
        missing = max(0.0, 1 - epoch / self.ramp_epochs) if self.ramp_epochs else 0.0
        self.loss_weights["one"] = self.weight_one * math.exp(-5 * missing**2)

    def gate_weights(self, student: NetOutput) -> Tensor:
        """Return the weight of every learner for every image.

        Args:
            student: Output with M auxiliary learners.

        Returns:
            ``B x (1 + M)`` float32 whose rows sum to 1; the target learner is first.
        """
        weights: Tensor = self.gate(features_of(student)[-2])
        return weights

    def ensemble(self, student: NetOutput) -> Tensor:
        """Return the logits of the native ensemble: target and auxiliary learners, weighed by the gate.

        Args:
            student: Output with auxiliary learners.

        Returns:
            ``B x K`` float32.
        """
        return weighted_logits(self.gate_weights(student), all_logits(student))

    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Update the gate's running statistics; arguments as in the base class."""
        if isinstance(self.gate, Gate):
            self.gate.remember(features_of(student)[-2])

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``ce_aux``, ``ce_ensemble`` and ``one``; arguments as in the base class.

        Gradients of ``ce_ensemble`` reach all learners and the gate, those of ``one`` all learners but not the gate.
        """
        group = self.ensemble(student)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "ce_aux": torch.stack([cross_entropy(each.logits, batch.labels) for each in student.branches]).sum(),
            "ce_ensemble": cross_entropy(group, batch.labels),
            "one": one_loss(all_logits(student), group, temperature=self.temperature),
        }

    def statistics(self, student: NetOutput) -> dict[str, Tensor]:
        """Return the mean gate weight of the target and of every auxiliary learner.

        Args:
            student: Output with auxiliary learners.
        """
        target, *others = self.gate_weights(student).mean(dim=0)
        auxiliary = {f"gate_weight_aux{number}": share for number, share in enumerate(others, start=1)}
        return {"gate_weight_target": target, **auxiliary}
