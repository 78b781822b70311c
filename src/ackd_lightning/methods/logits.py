"""What the methods that compare logits image by image share: standardised logits and a weight for every image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ackd_lightning.functional import entropy_weights, standardized
from ackd_lightning.methods.base import Method, TeacherAccess
from ackd_lightning.validation import Positive

LogitLoss = Callable[[Tensor, Tensor], Tensor]
"""Function of the logits ``B x K`` of student and teacher that returns a loss for every image, ``B``."""


class LogitMethod(Method):
    """Base of methods with distillation terms that are means over images of a loss between two rows of logits.

    Args:
        standardize: Whether the terms read standardised logits; see `ackd_lightning.functional.standardized`.
        entropy_temperature: Temperature of the entropies that weigh the images; see
            `ackd_lightning.functional.entropy_weights`. None for equal weights.
    """

    teacher: TeacherAccess = "logits"

    def __init__(self, *, standardize: bool = False, entropy_temperature: Positive | None = None) -> None:
        super().__init__()
        self.standardize, self.entropy_temperature = standardize, entropy_temperature

    def mean_loss(self, loss: LogitLoss, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the mean over images of a loss, on standardised logits and with weights where these are chosen.

        The weights are computed from the logits that the loss reads, as in the released code of EA-KD.

        Args:
            loss: Loss of every image.
            student_logits: Logits ``B x K`` of the side that learns.
            teacher_logits: Logits ``B x K`` of the side that is learned from.

        Returns:
            Scalar float32.
        """
        if self.standardize:
            student_logits, teacher_logits = standardized(student_logits), standardized(teacher_logits)
        losses = loss(student_logits, teacher_logits)
        if self.entropy_temperature is not None:
            losses = losses * entropy_weights(student_logits, teacher_logits, temperature=self.entropy_temperature)
        return losses.mean()
