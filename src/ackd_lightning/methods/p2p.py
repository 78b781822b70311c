r"""P2P. Niyaz, Bathula: Augmenting Knowledge Distillation With Peer-To-Peer Mutual Learning, 2021 (arXiv:2110.11023).

Several students learn from one teacher and from each other:

* \(L_{kd} = \sum_i \tau^2\,\mathrm{KL}(p^t \| p_i)\) over the n students
* \(L_{mutual} = \sum_i \frac{\tau^2}{n - 1} \sum_{j \ne i} \mathrm{KL}(p_j \| p_i)\), no gradient into the \(p_j\)
* \(L = w_{ce}\,\mathrm{CE}(p_1, y) + w_{aux} \sum_{i > 1} \mathrm{CE}(p_i, y) + w_{kd} L_{kd} + w_{mutual} L_{mutual}\)

Student 1 is the one that is kept; ``val/group_acc`` is the accuracy of the mean of all students' logits, the ensemble
that the abstract reports. There, the teacher is trained together with the students. This is ``online_teacher``: a
network that learns from the labels alone (in the term ``ce_aux``) while the students learn from it. Without it, the
teacher is the given one, trained before and frozen (ours). The full text was not available to us: the form of the
divergences, their means, temperature and weights are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ackd_lightning.functional import cross_entropy, kd_loss
from ackd_lightning.methods.base import Method
from ackd_lightning.methods.peers import all_logits, mutual_loss, require_networks
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


class P2P(Method):
    """Students that learn from the labels, from one teacher and from each other.

    Args:
        students: The other students, n - 1 of them: ``peer`` for a network of the student's structure with new weights,
            or a model name such as ``resnet14``.
        online_teacher: Network that is trained along as the teacher, a model name such as ``resnet110``; None for the
            given teacher, which is frozen.
        temperature: Temperature tau, above 0.
        weight_ce: Weight of the student's cross-entropy.
        weight_ce_aux: Weight of the other networks' cross-entropies (their sum).
        weight_kd: Weight of the divergences from the teacher.
        weight_mutual: Weight of the mutual divergences.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> P2P(students=["peer", "resnet14"], online_teacher="resnet110").branches
        ('peer', 'resnet14', 'resnet110')
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        students: Sequence[str] = ("peer",),
        online_teacher: str | None = None,
        temperature: Positive = 3.0,
        weight_ce: NonNegative = 1.0,
        weight_ce_aux: NonNegative = 1.0,
        weight_kd: NonNegative = 1.0,
        weight_mutual: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.branches = require_networks(students, "students", "P2P")
        self.count = 1 + len(self.branches)
        self.teacher = "logits"
        if online_teacher is not None:
            self.branches += require_networks([online_teacher], "online_teacher", "P2P")
            self.teacher = "none"
        self.temperature = temperature
        self.loss_weights = {"ce": weight_ce, "ce_aux": weight_ce_aux, "kd": weight_kd, "mutual": weight_mutual}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``ce_aux``, ``kd`` and ``mutual``; arguments as in the base class."""
        every = all_logits(student)
        students = every[: self.count]
        source = every[-1] if teacher is None or self.teacher == "none" else teacher.logits
        divergences = [kd_loss(each, source, temperature=self.temperature) for each in students]
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "ce_aux": torch.stack([cross_entropy(each, batch.labels) for each in every[1:]]).sum(),
            "kd": torch.stack(divergences).sum(),
            "mutual": mutual_loss(students, temperature=self.temperature),
        }

    def ensemble(self, student: NetOutput) -> Tensor:
        """Return the mean of the students' logits.

        Args:
            student: Output of the student with its peers.

        Returns:
            ``B x K`` float32.
        """
        return torch.stack([each.float() for each in all_logits(student)[: self.count]]).mean(dim=0)
