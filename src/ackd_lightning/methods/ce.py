"""Plain training: cross-entropy with the labels, no teacher."""

from __future__ import annotations

from torch import Tensor

from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import Method
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative


class CE(Method):
    """Cross-entropy alone, for teachers and for the student without distillation.

    Args:
        weight_ce: Weight of the cross-entropy.

    Examples:
        >>> CE().loss_weights
        {'ce': 1.0}
    """

    teacher = "none"
    labels = "mixed"

    def __init__(self, *, weight_ce: NonNegative = 1.0) -> None:
        super().__init__()
        self.loss_weights = {"ce": weight_ce}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the term ``ce``; arguments as in the base class."""
        return {"ce": cross_entropy(student.logits, batch.labels)}
