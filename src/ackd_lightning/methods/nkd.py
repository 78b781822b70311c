r"""NKD. Yang, Zeng, Li, Zhang, Yuan, Li: From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023.

With the probabilities \(S, T\) of student and teacher, the target class t, and \(\mathcal N\), which normalises the
other classes to a sum of 1 after a temperature \(\lambda\) (arXiv:2303.13005):

\(L_{nkd} = -T_t \log S_t - \gamma\,\lambda^2 \sum_{i \ne t} \mathcal N(T_i^\lambda) \log \mathcal N(S_i^\lambda)\)

\(L = w_{ce}\,\mathrm{CE}(S, y) + w_{nkd}\,L_{nkd}\). The first part has no temperature. Both are cross-entropies, so
the loss of a student that equals its teacher is not 0. The defaults are those of the authors' code for ImageNet,
\(\lambda\) 1 and \(\gamma\) 1.5.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.functional import cross_entropy, target_and_rest
from ackd_lightning.methods.logits import LogitMethod
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, gamma: float, temperature: float
) -> Tensor:
    """Return the normalised loss of every image.

    No gradient flows into the teacher.

    Args:
        student_logits: Logits ``B x K`` of the student, K at least 2.
        teacher_logits: Logits ``B x K`` of the teacher.
        target: Classes, ``B`` int64.
        gamma: Weight of the other classes.
        temperature: Temperature lambda of the other classes, above 0.

    Returns:
        ``B`` float32, in nats.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> nkd_loss(student, teacher, torch.tensor([0]), gamma=1.5, temperature=1.0)
        tensor([0.7484])
    """
    teacher_logits = teacher_logits.detach()
    log_target = F.log_softmax(student_logits.float(), dim=1).gather(1, target[:, None]).squeeze(1)
    target_share = teacher_logits.float().softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    _, student_rest = target_and_rest(student_logits, target, temperature=temperature)
    _, teacher_rest = target_and_rest(teacher_logits, target, temperature=temperature)
    return -target_share * log_target - gamma * temperature**2 * (teacher_rest.exp() * student_rest).sum(dim=1)


class NKD(LogitMethod):
    """Cross-entropy plus a target part and a normalised part of the other classes.

    Args:
        gamma: Weight of the other classes.
        temperature: Temperature lambda of the other classes, above 0.
        standardize: Whether to standardise the logits of every image before the distillation term reads them.
        entropy_temperature: Temperature of the entropies that weigh the images (EA-KD; 3 in its paper). None for equal
            weights.
        weight_ce: Weight of the cross-entropy.
        weight_nkd: Weight of the distillation term.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "smoothed"

    def __init__(
        self,
        *,
        gamma: NonNegative = 1.5,
        temperature: Positive = 1.0,
        standardize: bool = False,
        entropy_temperature: Positive | None = None,
        weight_ce: NonNegative = 1.0,
        weight_nkd: NonNegative = 1.0,
    ) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        self.gamma, self.temperature = gamma, temperature
        self.loss_weights = {"ce": weight_ce, "nkd": weight_nkd}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``nkd``; arguments as in the base class."""
        assert teacher is not None
        loss = functools.partial(nkd_loss, target=batch.target, gamma=self.gamma, temperature=self.temperature)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "nkd": self.mean_loss(loss, student.logits, teacher.logits),
        }
