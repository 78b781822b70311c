r"""CES-KD. Amara, Ziaeefard, Meyer, Gross, Clark: Curriculum-based Expert Selection for Guided KD, 2022.

(arXiv:2209.07606.) A student learns easy images better from a smaller network and hard images from a larger one. So
each image has a single expert, the teacher or one of its n - 1 assistants, chosen by how difficult the image is. This
is what the abstract states; the full text was not available to us. Difficulty, strata and curriculum are ours:

* the difficulty of an image is the cross-entropy of the experts' predictions with its label, mean over the experts
* \(u\) is the share of the images of the batch that are easier, \(0 \le u < 1\)
* the expert of the image is number \(\lfloor s\,n\,u \rfloor\), counted from the smallest, where s grows linearly from
  1/n, the smallest expert for all images, to 1, where each expert has an equal share of the images

\(L = w_{ce}\,\mathrm{CE}(p^s, y) + w_{kd}\,\tau^2\,\mathrm{KL}(p^{e}_\tau \| p^s_\tau)\) with the expert e of every
image. Temperature and weights are those of KD here.
"""

from __future__ import annotations

import functools
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kl_per_image, whole_batch
from ackd_lightning.methods.base import FitInfo, Networks
from ackd_lightning.methods.guides import GuidedMethod
from ackd_lightning.methods.warmup import linear_warmup
from ackd_lightning.models.copies import name_of
from ackd_lightning.models.weight_files import tell
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, NonNegativeInt, Positive


def choose_experts(difficulty: Tensor, experts: int, share: float) -> Tensor:
    """Return the expert of every image, counted from the largest.

    Args:
        difficulty: Difficulty of every image, ``B``. With several processes the images of all are compared.
        experts: Number n of experts.
        share: Share s of the curriculum, from 1/n to 1.

    Returns:
        ``B`` int64 from 0 to n - 1.

    Examples:
        >>> choose_experts(torch.tensor([0.1, 5.0, 0.2, 0.3]), 2, 1.0)  # the two hardest have the largest expert
        tensor([1, 0, 1, 0])
        >>> choose_experts(torch.tensor([0.1, 5.0, 0.2, 0.3]), 2, 0.75)  # 1.5 * 3 / 4 is above 1, 1.5 * 2 / 4 is not
        tensor([1, 0, 1, 1])
    """
    everyone = whole_batch(difficulty)
    easier = (everyone < difficulty[:, None]).sum(dim=1)
    level = (easier * (experts * share) / len(everyone)).floor().long()
    return experts - 1 - level.clamp(max=experts - 1)


class CESKD(GuidedMethod):
    """Cross-entropy plus divergence from one of several experts, chosen for each image by a curriculum of difficulty.

    Args:
        temperature: Temperature tau, above 0.
        curriculum_epochs: Number of epochs after which the experts have equal shares of the images; 0 for equal shares
            from the start. None for half of the training.
        standardize: Whether to standardise the logits of every image before the distillation term reads them.
        entropy_temperature: Temperature of the entropies that weigh the images (EA-KD; 3 in its paper). None for equal
            weights.
        weight_ce: Weight of the cross-entropy.
        weight_kd: Weight of the distillation term.

    Raises:
        ACKDError: If a value is not allowed.
    """

    labels = "smoothed"

    def __init__(
        self,
        *,
        temperature: Positive = 4.0,
        curriculum_epochs: NonNegativeInt | None = None,
        standardize: bool = False,
        entropy_temperature: Positive | None = None,
        weight_ce: NonNegative = 0.1,
        weight_kd: NonNegative = 0.9,
    ) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        self.temperature, self.given_epochs = temperature, curriculum_epochs
        self.curriculum_epochs, self.epoch = curriculum_epochs or 0, 0
        self.loss_weights = {"ce": weight_ce, "kd": weight_kd}

    def build(self, networks: Networks) -> None:
        """Count the experts, and compare their sizes.

        Args:
            networks: Networks of the training.

        Raises:
            ACKDError: If there is one teacher alone, or a larger expert is listed after a smaller one.
        """
        super().build(networks)
        for larger, smaller in itertools.pairwise(networks.teacher_networks):
            counts = [sum(each.numel() for each in network.parameters()) for network in (larger, smaller)]
            if counts[0] < counts[1]:
                raise ACKDError(
                    f"`teacher` lists {name_of(larger)} with {counts[0]:,} parameters before {name_of(smaller)} with "
                    f"{counts[1]:,} and method CESKD has the earlier ones teach the harder images; list the largest "
                    "network first"
                )

    def begin_fit(self, fit: FitInfo) -> None:
        """Take the experts and the length of the curriculum.

        Args:
            fit: Information about the fit, of which the teachers and the epochs are read.

        Raises:
            ACKDError: If the number of epochs is unknown and needed.
        """
        super().begin_fit(fit)
        if self.given_epochs is None:
            if fit.epochs is None:
                raise ACKDError(
                    "the number of epochs, half of which is the curriculum of method CESKD, is unknown; set "
                    "curriculum_epochs, or trainer.max_epochs"
                )
            self.curriculum_epochs = fit.epochs // 2
        elif fit.epochs is not None and fit.epochs < self.given_epochs:
            tell(
                f"the curriculum of CESKD takes {self.given_epochs} epochs and the fit has {fit.epochs}, so the larger "
                "experts get fewer images than the smaller ones; --model.method.curriculum_epochs sets another length"
            )

    def set_epoch(self, epoch: int) -> None:
        """Store the epoch, which the curriculum depends on.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = epoch

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Run the experts and return the terms ``ce`` and ``kd``; arguments as in the base class."""
        experts = torch.stack(self.guide_logits(batch))  # n x B x K
        count, images, classes = experts.shape
        target = batch.target.expand(count, images).flatten()
        difficulty = F.cross_entropy(experts.flatten(0, 1), target, reduction="none").view(count, images).mean(dim=0)
        progress = linear_warmup(self.epoch, self.curriculum_epochs, first=0)
        number = choose_experts(difficulty, count, (1 + (count - 1) * progress) / count)
        chosen = experts.gather(0, number[None, :, None].expand(1, images, classes)).squeeze(0)
        loss = functools.partial(kl_per_image, temperature=self.temperature)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "kd": self.mean_loss(loss, student.logits, chosen),
        }
