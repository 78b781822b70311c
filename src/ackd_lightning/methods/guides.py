"""What the methods share in which a teacher and its assistants, all frozen, teach one student."""

from __future__ import annotations

from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import FitInfo, Networks
from ackd_lightning.methods.logits import LogitMethod
from ackd_lightning.methods.running import require_logits
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.types import Batch
from ackd_lightning.validation import Positive


class GuidedMethod(LogitMethod):
    """Base of methods with several guides: the given teachers, first the teacher and then its assistants.

    Args:
        standardize: Whether the terms read standardised logits; see `LogitMethod`.
        entropy_temperature: Temperature of the entropies that weigh the images; see `LogitMethod`.
    """

    teacher = "own"
    guides: tuple[FrozenTeacher, ...]

    def __init__(self, *, standardize: bool = False, entropy_temperature: Positive | None = None) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        self.keep_outside("guides", ())

    def build(self, networks: Networks) -> None:
        """Count the guides.

        Args:
            networks: Shapes of the teachers.

        Raises:
            ACKDError: If there is one teacher alone.
        """
        if len(networks.teachers) < 2:
            raise ACKDError(
                f"method {type(self).__name__} learns from a teacher and its assistants, and `teacher` names "
                f"{len(networks.teachers)} network; list the teacher and then the assistants"
            )

    def begin_fit(self, fit: FitInfo) -> None:
        """Take the guides.

        Args:
            fit: Information about the fit, of which the teachers are read.

        Raises:
            ACKDError: If the features of a guide alone are used.
        """
        guides = tuple(require_logits(teacher, type(self).__name__) for teacher in fit.teachers)
        self.keep_outside("guides", guides)

    def guide_logits(self, batch: Batch) -> list[Tensor]:
        """Run all guides.

        Args:
            batch: Images.

        Returns:
            Logits ``B x K`` float32 of each guide, without gradient.

        Raises:
            ACKDError: If ``begin_fit`` was not called with the guides.
        """
        if not self.guides:
            raise ACKDError(
                f"method {type(self).__name__} has no guides yet; call begin_fit with the teachers before the first "
                "step"
            )
        return [guide(batch.image).logits for guide in self.guides]
