r"""Decoupled knowledge distillation. Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, 2022.

With \(p = \mathrm{softmax}(z / \tau)\), y the target class, \(b = (p_y, 1 - p_y)\) the binary distribution "target or
rest" and \(\hat p = p_{i \ne y} / (1 - p_y)\) the distribution among the other classes (Eq. 7 of that paper):

\(L_{dkd} = \tau^2 \left(\alpha\,\mathrm{KL}(b^t \| b^s) + \beta\,\mathrm{KL}(\hat p^t \| \hat p^s)\right)\)

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + \min(e / e_w, 1)\,w_{dkd}\,L_{dkd}\) in epoch e, counted from 1, with e_w epochs of
warm-up. With \(\alpha = 1\) and \(\beta = 1 - p^t_y\) of every image \(L_{dkd}\) is Hinton's loss.
"""

from __future__ import annotations

import functools

from torch import Tensor

from ackd_lightning.functional import cross_entropy, kl_of_logs, target_and_rest
from ackd_lightning.methods.base import FitInfo
from ackd_lightning.methods.logits import LogitMethod
from ackd_lightning.methods.warmup import linear_warmup, tell_if_shorter
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, NonNegativeInt, Positive


def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    r"""Return the loss \(\alpha\,\mathrm{TCKD} + \beta\,\mathrm{NCKD}\) (Eq. 7) of every image.

    No gradient flows into the teacher.

    Args:
        student_logits: Logits ``B x K`` of the student, K at least 2.
        teacher_logits: Logits ``B x K`` of the teacher.
        target: Classes, ``B`` int64.
        alpha: Weight of the target class against the rest (TCKD).
        beta: Weight of the other classes among themselves (NCKD).
        temperature: Temperature tau, above 0.

    Returns:
        ``B`` float32, in nats, times tau squared.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=4.0)
        tensor([1.2474])
    """
    student_binary, student_rest = target_and_rest(student_logits, target, temperature=temperature)
    teacher_binary, teacher_rest = target_and_rest(teacher_logits.detach(), target, temperature=temperature)
    losses = alpha * kl_of_logs(student_binary, teacher_binary) + beta * kl_of_logs(student_rest, teacher_rest)
    return losses * temperature**2


class DKD(LogitMethod):
    """Cross-entropy plus distillation with separate weights for the target class and the other classes.

    Args:
        alpha: Weight of the target class against the rest (TCKD).
        beta: Weight of the other classes among themselves (NCKD); 8 for ResNets in the authors' code, but 2 for
            resnet56 to resnet20 and resnet110 to resnet32, and 6 for VGG and wide ResNets.
        temperature: Temperature tau, above 0.
        warmup_epochs: Number of epochs over which the weight of ``dkd`` grows linearly, from 1/n in the first of n; 0
            for no warm-up. A shorter run ends below the full weight.
        standardize: Whether to standardise the logits of every image before the distillation term reads them.
        entropy_temperature: Temperature of the entropies that weigh the images (EA-KD; 3 in its paper). None for equal
            weights.
        weight_ce: Weight of the cross-entropy.
        weight_dkd: Weight of the distillation term after the warm-up.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "smoothed"

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: Positive = 4.0,
        warmup_epochs: NonNegativeInt = 20,
        standardize: bool = False,
        entropy_temperature: Positive | None = None,
        weight_ce: NonNegative = 1.0,
        weight_dkd: NonNegative = 1.0,
    ) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.warmup_epochs, self.weight_dkd = warmup_epochs, weight_dkd
        self.loss_weights = {"ce": weight_ce, "dkd": weight_dkd}

    def begin_fit(self, fit: FitInfo) -> None:
        """Say if the fit is shorter than the warm-up.

        Args:
            fit: Information about the fit.
        """
        super().begin_fit(fit)
        tell_if_shorter("DKD", "dkd", self.warmup_epochs, fit.epochs)

    def set_epoch(self, epoch: int) -> None:
        """Set the weight of ``dkd``, which grows during the warm-up.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.loss_weights["dkd"] = self.weight_dkd * linear_warmup(epoch, self.warmup_epochs)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``dkd``; arguments as in the base class."""
        assert teacher is not None
        loss = functools.partial(
            dkd_loss, target=batch.target, alpha=self.alpha, beta=self.beta, temperature=self.temperature
        )
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "dkd": self.mean_loss(loss, student.logits, teacher.logits),
        }
