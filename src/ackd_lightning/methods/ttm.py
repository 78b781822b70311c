r"""TTM, WTTM. Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024 (arXiv:2402.11148).

Only the teacher has a temperature T, which raises its probabilities \(p\) to the power \(\gamma = 1/T\):
\(\hat p_k = p_k^\gamma / U_\gamma(p)\) with the power sum \(U_\gamma(p) = \sum_j p_j^\gamma\). With the student's
probabilities \(q\) at temperature 1:

* TTM: \(L = \mathrm{CE}(q, y) + \beta\,\mathrm{KL}(\hat p \| q)\)
* WTTM: \(L = \mathrm{CE}(q, y) + \beta\,U_\gamma(p)\,\mathrm{KL}(\hat p \| q)\), so that images of which the teacher is
  less sure count more

Nothing is multiplied by the temperature squared. At T 1 both are KD at temperature 1. The authors choose T and
\(\beta\) for every pair of networks. The defaults here are the two examples in their code, both from VGG-13 to VGG-8:
T 10 and \(\beta\) 45 for TTM; T 5 and \(\beta\) 4 for WTTM (fragment ``wttm``), which they give beside CRD.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.functional import cross_entropy, kl_of_logs
from ackd_lightning.methods.logits import LogitMethod
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


def ttm_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, weighted: bool) -> Tensor:
    """Return the divergence of the student from the transformed teacher, of every image.

    No gradient flows into the teacher.

    Args:
        student_logits: Logits ``B x K`` of the student.
        teacher_logits: Logits ``B x K`` of the teacher.
        temperature: Temperature T of the teacher, above 0.
        weighted: Whether to multiply by the teacher's power sum (WTTM).

    Returns:
        ``B`` float32, in nats.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 4.0]])
        >>> ttm_loss(student, teacher, temperature=4.0, weighted=False)
        tensor([0.1109])
        >>> ttm_loss(student, teacher, temperature=4.0, weighted=True)  # times 0.0180 ** 0.25 + 0.9820 ** 0.25
        tensor([0.1511])
    """
    log_teacher = F.log_softmax(teacher_logits.detach().float(), dim=1) / temperature  # of the powers
    log_sum = log_teacher.logsumexp(dim=1, keepdim=True)
    losses = kl_of_logs(F.log_softmax(student_logits.float(), dim=1), log_teacher - log_sum)
    return losses * log_sum.squeeze(1).exp() if weighted else losses


class TTM(LogitMethod):
    """Cross-entropy plus divergence from a teacher with a temperature that the student does not have.

    Args:
        temperature: Temperature T of the teacher, above 0.
        weighted: Whether to weigh every image by the teacher's power sum (WTTM).
        standardize: Whether to standardise the logits of every image before the distillation term reads them.
        entropy_temperature: Temperature of the entropies that weigh the images (EA-KD; 3 in its paper). None for equal
            weights.
        weight_ce: Weight of the cross-entropy.
        weight_ttm: Weight beta of the distillation term.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        temperature: Positive = 10.0,
        weighted: bool = False,
        standardize: bool = False,
        entropy_temperature: Positive | None = None,
        weight_ce: NonNegative = 1.0,
        weight_ttm: NonNegative = 45.0,
    ) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        self.temperature, self.weighted = temperature, weighted
        self.loss_weights = {"ce": weight_ce, "ttm": weight_ttm}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``ttm``; arguments as in the base class."""
        assert teacher is not None
        loss = functools.partial(ttm_loss, temperature=self.temperature, weighted=self.weighted)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "ttm": self.mean_loss(loss, student.logits, teacher.logits),
        }
