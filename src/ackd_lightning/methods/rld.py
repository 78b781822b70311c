r"""RLD. Sun, Chen, Lyu, Chen, Chen, Wang: Knowledge Distillation with Refined Logits, ICCV 2025 (arXiv:2408.07703).

The label y refines what the teacher says, in two parts that do not contradict the cross-entropy:

* sample confidence: \(b^s = (p^s_y, 1 - p^s_y)\) of the student and \(b^t = (p^t_{max}, 1 - p^t_{max})\) of the
  teacher, whatever class the teacher finds most likely, at temperature \(\tau_1\)
* masked correlation: the distributions \(\tilde p\) at temperature \(\tau_2\) among the classes whose teacher logit is
  below that of y. Masked are y and every class that the teacher finds at least as likely.

\(L_{rld} = \alpha\,\tau_1^2\,\mathrm{KL}(b^t \| b^s) + \beta\,\tau_2^2\,\mathrm{KL}(\tilde p^t \| \tilde p^s)\)

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + \min(e / e_w, 1)\,w_{rld}\,L_{rld}\) in epoch e, counted from 1, with e_w epochs of
warm-up. The defaults are those of the authors' code for CIFAR-100: \(\alpha\) 1, \(\beta\) 8, \(\tau_1\) 1,
\(\tau_2\) 4, 20 epochs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.functional import cross_entropy, kl_of_logs, target_and_rest
from ackd_lightning.methods.base import FitInfo
from ackd_lightning.methods.logits import LogitMethod
from ackd_lightning.methods.warmup import linear_warmup, tell_if_shorter
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, NonNegativeInt, Positive

_MASKED = torch.finfo(torch.float32).min / 2


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    confidence_temperature: float,
    temperature: float,
) -> Tensor:
    r"""Return the loss of refined logits of every image.

    The second part is 0 where the teacher finds fewer than two classes less likely than the target. No gradient flows
    into the teacher.

    Args:
        student_logits: Logits ``B x K`` of the student, K at least 2.
        teacher_logits: Logits ``B x K`` of the teacher.
        target: Classes, ``B`` int64.
        alpha: Weight of the sample confidence.
        beta: Weight of the masked correlation.
        confidence_temperature: Temperature tau_1 of the sample confidence, above 0.
        temperature: Temperature tau_2 of the masked correlation, above 0.

    Returns:
        ``B`` float32, in nats.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0, -1.0]])
        >>> settings = {"alpha": 1.0, "beta": 8.0, "confidence_temperature": 1.0, "temperature": 4.0}
        >>> rld_loss(student, teacher, torch.tensor([0]), **settings)  # class 1 is masked
        tensor([0.9946])
    """
    teacher_logits = teacher_logits.detach()
    student_binary, _ = target_and_rest(student_logits, target, temperature=confidence_temperature)
    likeliest = teacher_logits.argmax(dim=1)
    teacher_binary, _ = target_and_rest(teacher_logits, likeliest, temperature=confidence_temperature)
    confidence = kl_of_logs(student_binary, teacher_binary) * confidence_temperature**2
    masked = teacher_logits >= teacher_logits.gather(1, target[:, None])

    def below(logits: Tensor) -> Tensor:
        return F.log_softmax((logits.float() / temperature).masked_fill(masked, _MASKED), dim=1)

    correlation = kl_of_logs(below(student_logits), below(teacher_logits)) * temperature**2
    return alpha * confidence + beta * correlation


class RLD(LogitMethod):
    """Cross-entropy plus distillation from logits without the teacher's wrong guesses.

    Args:
        alpha: Weight of the sample confidence.
        beta: Weight of the masked correlation.
        confidence_temperature: Temperature tau_1 of the sample confidence, above 0.
        temperature: Temperature tau_2 of the masked correlation, above 0.
        warmup_epochs: Number of epochs over which the weight of ``rld`` grows linearly, from 1/n in the first of n; 0
            for no warm-up. A shorter run ends below the full weight.
        standardize: Whether to standardise the logits of every image before the distillation term reads them.
        entropy_temperature: Temperature of the entropies that weigh the images (EA-KD; 3 in its paper). None for equal
            weights.
        weight_ce: Weight of the cross-entropy.
        weight_rld: Weight of the distillation term after the warm-up.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "smoothed"

    def __init__(
        self,
        *,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 8.0,
        confidence_temperature: Positive = 1.0,
        temperature: Positive = 4.0,
        warmup_epochs: NonNegativeInt = 20,
        standardize: bool = False,
        entropy_temperature: Positive | None = None,
        weight_ce: NonNegative = 1.0,
        weight_rld: NonNegative = 1.0,
    ) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        self.alpha, self.beta = alpha, beta
        self.confidence_temperature, self.temperature = confidence_temperature, temperature
        self.warmup_epochs, self.weight_rld = warmup_epochs, weight_rld
        self.loss_weights = {"ce": weight_ce, "rld": weight_rld}

    def begin_fit(self, fit: FitInfo) -> None:
        """Say if the fit is shorter than the warm-up.

        Args:
            fit: Information about the fit.
        """
        super().begin_fit(fit)
        tell_if_shorter("RLD", "rld", self.warmup_epochs, fit.epochs)

    def set_epoch(self, epoch: int) -> None:
        """Set the weight of ``rld``, which grows during the warm-up.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.loss_weights["rld"] = self.weight_rld * linear_warmup(epoch, self.warmup_epochs)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``rld``; arguments as in the base class."""
        assert teacher is not None
        loss = functools.partial(
            rld_loss,
            target=batch.target,
            alpha=self.alpha,
            beta=self.beta,
            confidence_temperature=self.confidence_temperature,
            temperature=self.temperature,
        )
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "rld": self.mean_loss(loss, student.logits, teacher.logits),
        }
