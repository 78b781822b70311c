r"""ACN. Zhang, Hu, Qin, Xu, Wang: Adversarial co-distillation learning for image recognition, 2021.

An implementation of the abstract; the full text was not available to us. The abstract describes n classifiers that
train in parallel and learn from each other; *divergent examples*, images on which their predictions differ, generated
from the training images alone; two alternating phases, adversarial and co-distillation; and two modules for good
examples and stable training, *Weakly Residual Connection* and *Restricted Adversarial Search*. **All equations,
architectures and numbers below are ours.**

With \(p_i = \mathrm{softmax}(z_i)\) of classifier i, \(\tilde x\) an image generated from x
(`Generator`) and sg a stopped gradient:

* divergence, \(J(x) = H(\bar p) - \frac1n \sum_i H(p_i)\) with \(\bar p = \frac1n \sum_i p_i\), from 0 to \(\log n\)
* adversarial phase, the discriminator D:
  \(-\log D(x) - \log(1 - D(\mathrm{sg}\,\tilde x))\)
* adversarial phase, the generator, the classifiers frozen:
  \(-w_{gan} \log D(\tilde x) + w_{div} \max(0, c \log n - J(\tilde x))
  + w_{lab} \max(0, \mathrm{CE}(\bar p(\tilde x), y) - m)\)
* co-distillation phase, the classifiers, \(\tilde x\) fixed:
  \(\sum_i \mathrm{CE}(z_i(x), y) + w_{kd} M(x)
  + w_{gen} \big[ \sum_i \mathrm{CE}(z_i(\tilde x), y) + M(\tilde x) \big]\)
  with \(M = \sum_i \frac{\tau^2}{n - 1} \sum_{j \ne i} \mathrm{KL}(\mathrm{sg}\,p_j^\tau \| p_i^\tau)\)

The search is restricted by the cap c (no reward for more divergence), the hinge with margin m (the mean of the
classifiers must still predict the label), and one step of the generator per batch.

Without examples (\(w_{gen} = 0\)) and with \(\tau = 1\) this is DML: Zhang, Xiang, Hospedales, Lu: Deep Mutual
Learning, 2018. There the networks are updated in turn, each after a new forward pass of the others; here all are
updated at once, after one forward pass of each.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.functional import cross_entropy, mean_log_probability
from ackd_lightning.methods.acn_losses import (
    disagreement,
    js_divergence,
)
from ackd_lightning.methods.acn_networks import (
    Generator,
    ImageDiscriminator,
    ResidualConnection,
    image_noise,
)
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.methods.peers import all_logits, mutual_loss, require_networks
from ackd_lightning.models.freezing import evaluated, statistics_kept
from ackd_lightning.types import Batch, Examples, NetOutput
from ackd_lightning.validation import Fraction, NonNegative, NonNegativeInt, Positive, Range

_WARMUP = 10  # epochs
_WIDEST = 1024


class ACN(Method):
    """Classifiers that teach each other, also on generated images on which they disagree.

    Classifier 1 is the student, the others are its peers. Any of them can be exported. All defaults are our choice.

    Args:
        classifiers: Peers of the student, n - 1 of them: ``peer`` for a network of the student's structure with new
            weights, or a model name such as ``resnet14``.
        temperature: Temperature tau of the mutual distillation.
        weight_ce: Weight of the student's cross-entropy.
        weight_ce_aux: Weight of the peers' cross-entropies (their sum).
        weight_mutual: Weight w_kd of the mutual distillation on training images.
        weight_generated: Weight w_gen of cross-entropy and mutual distillation on generated images; 0 for no generated
            images, which is deep mutual learning.
        weight_gan: Weight w_gan of the generator's reward for images that look real; 0 for no discriminator.
        weight_divergence: Weight w_div of the generator's reward for divergent predictions.
        weight_label: Weight w_lab of the generator's penalty for images whose label the mean prediction misses.
        rho: Share of the original in a generated image; the initial value of a learned share.
        residual: Kind of the weakly residual connection, see `Generator`.
        cap: Divergence c above which there is no reward, as a share of log n.
        margin: Cross-entropy m of the mean prediction above which there is a penalty, in nats; None for no penalty.
        warmup_epochs: Number of epochs without generated images, since untrained classifiers disagree on all images.
            None for 10, but at most a quarter of the training.
        generator_width: Channels of the first convolution of generator and discriminator.
        adversary_lr: Learning rate of both (Adam, betas 0.5 and 0.999), decayed together with the student's.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> ACN(classifiers=["peer", "resnet14"], weight_generated=0.5).loss_weights
        {'ce': 1.0, 'ce_aux': 1.0, 'mutual': 1.0, 'generated': 0.5}
    """

    teacher = "none"

    def __init__(
        self,
        *,
        classifiers: Sequence[str] = ("peer",),
        temperature: Positive = 3.0,
        weight_ce: NonNegative = 1.0,
        weight_ce_aux: NonNegative = 1.0,
        weight_mutual: NonNegative = 1.0,
        weight_generated: NonNegative = 1.0,
        weight_gan: NonNegative = 0.1,
        weight_divergence: NonNegative = 1.0,
        weight_label: NonNegative = 1.0,
        rho: Fraction = 0.5,
        residual: ResidualConnection = "convex",
        cap: Annotated[float, Range(0, 1, open_low=True)] = 0.5,
        margin: NonNegative | None = 1.0,
        warmup_epochs: NonNegativeInt | None = None,
        generator_width: Annotated[int, Range(1, _WIDEST)] = 32,
        adversary_lr: Positive = 2e-4,
    ) -> None:
        super().__init__()
        self.labels = "smoothed" if weight_generated else "mixed"  # generated images have the class of one image
        if residual == "learned" and rho in (0, 1):
            raise ACKDError(f"rho is {rho} in method ACN with residual=learned; it must be above 0 and below 1")
        self.branches = require_networks(classifiers, "classifiers", "ACN")
        self.temperature = temperature
        self.loss_weights = {
            "ce": weight_ce,
            "ce_aux": weight_ce_aux,
            "mutual": weight_mutual,
            "generated": weight_generated,
        }
        self.weight_gan, self.weight_divergence, self.weight_label = weight_gan, weight_divergence, weight_label
        self.rho, self.cap, self.margin = rho, cap, margin
        self.given_warmup = warmup_epochs
        self.warmup_epochs = _WARMUP if warmup_epochs is None else warmup_epochs
        self.residual: ResidualConnection = residual
        self.generator_width, self.adversary_lr = generator_width, adversary_lr
        self.generates = self.random_by_index = weight_generated > 0
        self.epoch = 0
        self.knows_range = False
        self._made: tuple[Tensor, Tensor] | None = None  # images and generated ones
        self.generator: Generator | None = None
        self.image_discriminator: ImageDiscriminator | None = None
        self.classifier_nets: nn.Module | None
        self.keep_outside("classifier_nets", None)

    # ---------------------------------------------------------------- before the fit

    def build(self, networks: Networks) -> None:
        """Create generator and discriminator where they are needed.

        Args:
            networks: Networks of the training; the student's network is run on generated images.

        Raises:
            ACKDError: If the student has no peer.
        """
        student = networks.student
        self.keep_outside("classifier_nets", networks.student_network)
        self.knows_range = networks.pixel_range is not None
        if not student.branches:
            raise ACKDError(
                "method ACN needs at least two classifiers and the student has no peer; name one in `classifiers`"
            )
        if not self.generates:
            return
        low, high = networks.pixel_range or ((-1.0,) * networks.channels, (1.0,) * networks.channels)
        width = self.generator_width
        self.generator = Generator(low, high, width=width, residual=self.residual, rho=self.rho)
        if self.weight_gan:
            self.image_discriminator = ImageDiscriminator(len(low), width=width)

    def begin_fit(self, fit: FitInfo) -> None:
        """Shorten the default warm-up in a short training, and warn about an unknown pixel range or a long warm-up.

        Args:
            fit: Information about the fit, of which the number of epochs is read.
        """
        if self.generator is not None and not self.knows_range:
            warnings.warn(
                "method ACN assumes that pixels are from -1 to 1; pass mean and std of the data to the training module",
                stacklevel=2,
            )
        epochs = fit.epochs
        if epochs is None:
            return
        if self.given_warmup is None:
            self.warmup_epochs = min(_WARMUP, epochs // 4)
        elif self.generates and self.warmup_epochs >= epochs:
            warnings.warn(
                f"method ACN generates no images: warmup_epochs is {self.warmup_epochs} of {count_of(epochs, 'epoch')}"
                "; lower it",
                stacklevel=2,
            )

    def set_epoch(self, epoch: int) -> None:
        """Store the epoch, which warm-up and noise depend on.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = epoch

    # ---------------------------------------------------------------- generated images

    @property
    def is_searching(self) -> bool:
        """Whether images are generated in this epoch."""
        return self.generator is not None and self.epoch >= self.warmup_epochs

    def make(self, batch: Batch) -> Tensor:
        """Return generated images of a batch in this epoch.

        Args:
            batch: Images with their indices, which the noise depends on.

        Returns:
            Images ``B x C x H x W``; gradients flow into the generator.

        Raises:
            ACKDError: If there is no generator.
        """
        if self.generator is None:
            raise ACKDError("method ACN has no generator; set weight_generated above 0 and call `build`")
        noise = image_noise(batch.index, self.epoch, *batch.image.shape[2:])
        made: Tensor = self.generator(batch.image, noise)
        return made

    def _classifiers(self) -> nn.Module:
        if self.classifier_nets is None:
            raise ACKDError(
                "method ACN runs the classifiers on generated images; call `build` with the student's network"
            )
        return self.classifier_nets

    # ---------------------------------------------------------------- co-distillation phase

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``ce_aux``, ``mutual`` and ``generated``; arguments as in the base class.

        Gradients of ``generated`` reach the classifiers, not the generator; it is 0 in the warm-up. The classifiers run
        a second time for it, normalised by the statistics of the generated batch. The running statistics, which
        evaluation and export use, remain those of real images.
        """
        logits = all_logits(student)
        return {
            "ce": cross_entropy(student.logits, batch.labels),
            "ce_aux": torch.stack([cross_entropy(each, batch.labels) for each in logits[1:]]).sum(),
            "mutual": mutual_loss(logits, temperature=self.temperature),
            "generated": self._generated(batch),
        }

    def _generated(self, batch: Batch) -> Tensor:
        if not self.is_searching:
            return torch.zeros((), device=batch.image.device)
        with torch.no_grad():
            made = self.make(batch)
        classifiers = self._classifiers()
        with statistics_kept(classifiers):
            logits = all_logits(classifiers(made))
        labelled = torch.stack([cross_entropy(each, batch.labels) for each in logits]).sum()
        return labelled + mutual_loss(logits, temperature=self.temperature)

    # ---------------------------------------------------------------- adversarial phase

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        """Return Adam for discriminator and generator, in this order; none without generated images."""
        networks = {"image_discriminator": self.image_discriminator, "generator": self.generator}
        return {
            name: torch.optim.Adam(network.parameters(), lr=self.adversary_lr, betas=(0.5, 0.999))
            for name, network in networks.items()
            if network is not None
        }

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return the loss of the discriminator or the generator; None in the warm-up.

        Args:
            name: Name of the optimizer, ``image_discriminator`` or ``generator``.
            student: Unused; the classifiers are run on generated images.
            teacher: Unused.
            batch: Images, targets and indices.
        """
        if not self.is_searching:
            return None
        return self._generator_loss(batch) if name == "generator" else self._discriminator_loss(batch)

    def _discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.image_discriminator is not None
        made = self.make(batch)  # with its graph: the generator, which is next, has not changed until then
        self._made = (batch.image, made)
        real, fake = self.image_discriminator(torch.cat([batch.image, made.detach()])).chunk(2)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return loss, {"disc_loss": loss.detach(), "disc_acc": accuracy}

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.generator is not None
        classifiers, discriminator = self._classifiers(), self.image_discriminator
        kept, self._made = self._made, None
        made = kept[1] if kept is not None and kept[0] is batch.image else self.make(batch)
        with evaluated(classifiers, *([discriminator] if discriminator is not None else [])):
            logits = all_logits(classifiers(made))
            opinion = discriminator(made) if discriminator is not None else None
        divergence, mean = js_divergence(logits), mean_log_probability(logits)
        loss = self.weight_divergence * (self.cap * math.log(len(logits)) - divergence).clamp_min(0).mean()
        if self.margin is not None:
            unknown = F.nll_loss(mean, batch.target, reduction="none")
            loss = loss + self.weight_label * (unknown - self.margin).clamp_min(0).mean()
        if opinion is not None:
            loss = loss + self.weight_gan * F.softplus(-opinion).mean()
        values = {
            "generator_loss": loss.detach(),
            "generator_js": divergence.detach().mean(),
            "generator_divergence": disagreement(logits),
            "generator_label_consistency": (mean.argmax(dim=1) == batch.target).float().mean(),
            "generator_change": (made.detach() - batch.image).abs().float().mean(),
        }
        if self.residual == "learned":
            values["generator_rho"] = self.generator.rho.detach()
        return loss, values

    # ---------------------------------------------------------------- validation

    def ensemble(self, student: NetOutput) -> Tensor:
        """Return the mean of all classifiers' logits.

        Args:
            student: Output of the student with its peers.

        Returns:
            ``B x K`` float32.
        """
        return torch.stack([each.float() for each in all_logits(student)]).mean(dim=0)

    def statistics(self, student: NetOutput) -> dict[str, Tensor]:
        """Return the divergence of all classifiers on real images, in nats and as the share of images they disagree on.

        Args:
            student: Output of the student with its peers.
        """
        logits = all_logits(student)
        return {"divergence_js": js_divergence(logits).mean(), "divergence_rate": disagreement(logits)}

    @torch.no_grad()
    def examples(self, batch: Batch) -> Examples | None:
        """Return generated images and predicted classes in evaluation mode; None while there are none.

        Args:
            batch: Batch of validation data.
        """
        if not self.is_searching:
            return None
        classifiers, made = self._classifiers(), self.make(batch)
        with evaluated(classifiers):
            before, after = (all_logits(classifiers(each)) for each in (batch.image, made))
        names = [f"{number} {name}" for number, name in enumerate(("student", *(self.branches or ())))]
        answers = [
            torch.stack([first.argmax(dim=1), second.argmax(dim=1)])
            for first, second in zip(before, after, strict=True)
        ]
        return Examples(batch.image, made, dict(zip(names, answers, strict=True)), batch.target)
