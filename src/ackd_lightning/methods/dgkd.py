r"""DGKD. Son, Na, Choi, Hwang: Densely Guided KD using Multiple Teacher Assistants, ICCV 2021 (arXiv:2009.08825).

The teacher and n - 1 assistants of sizes between teacher and student, each trained before and frozen, guide the
student at once. In every step d of the n guides, drawn at random, are dropped (S is the set of the others):

\(L = w_{ce}\,\mathrm{CE}(p^s, y) + w_{kd} \sum_{g \in S} \tau^2\,\mathrm{KL}(p^g_\tau \| p^s_\tau)\)

In the paper an assistant, too, learns from all larger networks. The authors' code trains a single student on given
guides, as does this class: train the assistants with it one after the other.

Temperature 5, one dropped guide and no cross-entropy (their \(\lambda\) is 1) are the defaults of the authors' program,
which takes each divergence as a mean over the K classes rather than their sum: its distillation is weaker by the factor
K. Which guides are dropped depends on the seed and the number of the step alone (ours), so that a resumed run and every
process drop the same; all guides are run in any case.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kl_per_image
from ackd_lightning.methods.base import FitInfo, Networks
from ackd_lightning.methods.guides import GuidedMethod
from ackd_lightning.random import stateless_bits
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, NonNegativeInt, Positive

_STREAM = 0x44474B44  # keeps these random numbers apart from all others


class DGKD(GuidedMethod):
    """Divergence from a teacher and several assistants, some of which are dropped in every step.

    Args:
        temperature: Temperature tau, above 0.
        dropped: Number d of guides that are dropped in a step, below the number of guides; 0 for none.
        standardize: Whether to standardise the logits of every image before the distillation term reads them.
        entropy_temperature: Temperature of the entropies that weigh the images (EA-KD; 3 in its paper). None for equal
            weights.
        weight_ce: Weight of the cross-entropy; 0 in the authors' program.
        weight_kd: Weight of the sum of the divergences.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> method = DGKD(dropped=2)
        >>> method.begin_fit(FitInfo(seed=3))
        >>> method.kept(4)
        tensor([0., 1., 1., 0.])
    """

    labels = "mixed"
    replicated_buffers = ("steps",)
    steps: Tensor

    def __init__(
        self,
        *,
        temperature: Positive = 5.0,
        dropped: NonNegativeInt = 1,
        standardize: bool = False,
        entropy_temperature: Positive | None = None,
        weight_ce: NonNegative = 0.0,
        weight_kd: NonNegative = 1.0,
    ) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        self.temperature, self.dropped, self.seed = temperature, dropped, 0
        self.loss_weights = {"ce": weight_ce, "kd": weight_kd}
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def build(self, networks: Networks) -> None:
        """Count the guides.

        Args:
            networks: Shapes of the teachers.

        Raises:
            ACKDError: If there is one teacher alone, or as many guides are dropped as there are.
        """
        super().build(networks)
        count = len(networks.teachers)
        if self.dropped >= count:
            raise ACKDError(
                f"dropped is {self.dropped} in method DGKD and `teacher` names {count} networks; it must be below "
                f"{count}"
            )

    def begin_fit(self, fit: FitInfo) -> None:
        """Take the guides and the seed.

        Args:
            fit: Information about the fit, of which the teachers and the seed are read.
        """
        super().begin_fit(fit)
        self.seed = fit.seed

    def kept(self, guides: int) -> Tensor:
        """Return which guides are kept in this step.

        Args:
            guides: Number n of guides.

        Returns:
            ``n`` float32: 1 for a guide that is kept, 0 for one that is dropped.
        """
        numbers = torch.arange(guides, device=self.steps.device)
        order = stateless_bits(self.seed, _STREAM, self.steps.expand(guides), numbers).argsort()
        return torch.ones(guides, device=self.steps.device).index_fill(0, order[: self.dropped], 0.0)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Run the guides and return the terms ``ce`` and ``kd``; arguments as in the base class."""
        loss = functools.partial(kl_per_image, temperature=self.temperature)
        losses = [self.mean_loss(loss, student.logits, each) for each in self.guide_logits(batch)]
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "kd": (torch.stack(losses) * self.kept(len(losses))).sum(),
        }

    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Count the step; arguments as in the base class."""
        self.steps += 1
