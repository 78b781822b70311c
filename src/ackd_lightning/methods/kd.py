r"""Knowledge distillation. Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{kd}\,\tau^2\,\mathrm{KL}(p^t \| p^s)\)

With ``standardize`` it is KD with logit standardization (Sun, Ren, Li, Wang, Cao, CVPR 2024), for which the authors use
tau 2 and the weights 0.1 and 9 (fragment ``kd_ls``); with ``entropy_temperature`` it is EA-KD (Su et al., ICCV 2025).
"""

from __future__ import annotations

import functools

from torch import Tensor

from ackd_lightning.functional import cross_entropy, kl_per_image
from ackd_lightning.methods.logits import LogitMethod
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive


class KD(LogitMethod):
    """Cross-entropy with the labels plus divergence from the teacher's softened classes.

    Args:
        temperature: Temperature tau, above 0.
        standardize: Whether to standardise the logits of every image before the distillation term reads them.
        entropy_temperature: Temperature of the entropies that weigh the images (EA-KD; 3 in its paper). None for equal
            weights.
        weight_ce: Weight of the cross-entropy; 0.1 in the benchmark that the ACKD paper compares with.
        weight_kd: Weight of the distillation term; 0.9 in that benchmark.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> import torch
        >>> logits, target = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
        >>> batch = Batch(torch.zeros(1, 3, 8, 8), target, torch.tensor([0]))
        >>> terms = KD()(NetOutput(logits), NetOutput(logits.flip(1)), batch)
        >>> {name: round(term.item(), 4) for name, term in terms.items()}
        {'ce': 0.4076, 'kd': 1.3196}
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        temperature: Positive = 4.0,
        standardize: bool = False,
        entropy_temperature: Positive | None = None,
        weight_ce: NonNegative = 0.1,
        weight_kd: NonNegative = 0.9,
    ) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        self.temperature = temperature
        self.loss_weights = {"ce": weight_ce, "kd": weight_kd}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce`` and ``kd``; arguments as in the base class."""
        assert teacher is not None
        loss = functools.partial(kl_per_image, temperature=self.temperature)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "kd": self.mean_loss(loss, student.logits, teacher.logits.detach()),
        }
