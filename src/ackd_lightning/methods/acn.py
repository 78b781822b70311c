r"""ACN. Zhang, Hu, Qin, Xu, Wang: Adversarial co-distillation learning for image recognition, 2021.

An implementation of the abstract: only that was within reach. From the abstract are the n classifiers that train in
parallel and learn from each other; the *divergent examples*, images on which their predictions differ, generated from
the training images alone; the two phases, adversarial and co-distillation, that alternate; and the names of two modules
that keep the examples good and the training stable, *Weakly Residual Connection* and *Restricted Adversarial Search*.
**Every equation, architecture and number below is ours.**

With \(p_i = \mathrm{softmax}(z_i)\) of classifier i, \(\tilde x\) an image made out of x
([`Generator`][ackd_lightning.methods.acn_networks.Generator]) and sg a stopped gradient:

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

The restrictions of the search are the cap c (no reward for more divergence), the hinge with margin m (the classifiers'
mean must know the label still), and one step of the generator a batch.

Without examples (\(w_{gen} = 0\)) and with \(\tau = 1\) this is DML: Zhang, Xiang, Hospedales, Lu: Deep Mutual
Learning, 2018. There the networks step in turn, each after a fresh look at the others; here all step at once, from one
forward pass of each.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss
from ackd_lightning.methods.acn_networks import (
    Generator,
    ImageDiscriminator,
    ResidualConnection,
    image_noise,
)
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.types import Batch, Examples, NetOutput
from ackd_lightning.validation import Fraction, NonNegative, NonNegativeInt, Positive, Range

_WARMUP = 10  # epochs
_WIDEST = 1024


def mutual_loss(logits: Sequence[Tensor], *, temperature: float) -> Tensor:
    r"""Distillation among n classifiers, M of this module's equations.

    \(\sum_i \frac{\tau^2}{n - 1} \sum_{j \ne i} \mathrm{KL}(p_j \| p_i)\), batch mean; no gradient flows into the
    \(p_j\).

    Args:
        logits: of n >= 2 classifiers, ``B x K`` each.
        temperature: tau, > 0.

    Returns:
        Scalar float32, in nats.
    """
    pairs = [
        kd_loss(own, other, temperature=temperature)
        for i, own in enumerate(logits)
        for j, other in enumerate(logits)
        if i != j
    ]
    return torch.stack(pairs).sum() / (len(logits) - 1)


def mean_log_probability(logits: Sequence[Tensor]) -> Tensor:
    r"""Logarithm of the classifiers' mean prediction, \(\log \bar p\).

    Args:
        logits: of n classifiers, ``B x K`` each.

    Returns:
        ``B x K`` float32.
    """
    every = torch.stack([F.log_softmax(each.float(), dim=1) for each in logits])
    return every.logsumexp(dim=0) - math.log(len(logits))


def js_divergence(logits: Sequence[Tensor]) -> Tensor:
    r"""How far n classifiers' predictions are apart: Jensen-Shannon divergence, J of this module's equations.

    It is computed as the equal \(\frac1n \sum_i \mathrm{KL}(p_i \| \bar p)\), which loses no digits near 0. The
    gradient flows into all logits.

    Args:
        logits: of n classifiers, ``B x K`` each.

    Returns:
        ``B`` float32 from 0 to log n, in nats.
    """
    every = torch.stack([F.log_softmax(each.float(), dim=1) for each in logits])
    ratio = every - mean_log_probability(logits)
    return (every.exp() * ratio).sum(dim=2).mean(dim=0)


def disagreement(logits: Sequence[Tensor]) -> Tensor:
    """Share of the images to which any two classifiers give different answers.

    Args:
        logits: of n classifiers, ``B x K`` each.

    Returns:
        Scalar in [0, 1].
    """
    answers = torch.stack([each.argmax(dim=1) for each in logits])
    return (answers != answers[0]).any(dim=0).float().mean()


@contextlib.contextmanager
def bystanders(*networks: nn.Module) -> Iterator[None]:
    """Networks that a player's loss only goes through: evaluation mode, no gradient for their parameters.

    Afterwards every layer and parameter is as before.

    Args:
        networks: whose weights and buffers stay.
    """
    modes = [(layer, layer.training) for network in networks for layer in network.modules()]
    trainable = [each for network in networks for each in network.parameters() if each.requires_grad]
    try:
        for layer, _ in modes:
            layer.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for layer, training in modes:
            layer.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """Running statistics of BatchNorm stay; in training mode batches are normalised by their own, as ever.

    Args:
        network: whose layers are looked through.
    """
    layers = [each for each in network.modules() if isinstance(each, _NormBase) and each.track_running_stats]
    try:
        for layer in layers:
            layer.track_running_stats = False
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class ACN(Method):
    """Classifiers that teach each other, also on images that a generator makes for them to disagree on.

    Classifier 1 is the student, the others its peers. Any of them can be exported. All defaults are our choice.

    Args:
        classifiers: the peers: ``peer`` is a network of the student's structure with fresh weights, a model name such
            as ``resnet14`` one of another; n is one more than they are.
        temperature: tau of the mutual distillation.
        weight_ce: weight of the student's cross-entropy.
        weight_ce_aux: weight of the peers' cross-entropies (their sum).
        weight_mutual: w_kd, weight of the mutual distillation on training images.
        weight_generated: w_gen, weight of cross-entropy and mutual distillation on generated images; 0: none are made,
            which is deep mutual learning.
        weight_gan: w_gan, the generator's reward for images that look real; 0: there is no discriminator.
        weight_divergence: w_div, its reward for divergent predictions.
        weight_label: w_lab, its penalty for images whose label the classifiers' mean no longer knows.
        rho: share of the original in a generated image; where the learned one begins.
        residual: the weakly residual connection, see `Generator`.
        cap: c, the divergence beyond which there is no reward, as a share of log n.
        margin: m in nats, cross-entropy of the mean prediction beyond which there is a penalty; None: no penalty.
        warmup_epochs: epochs without generated images: untrained classifiers disagree on everything. None: 10, but at
            most a quarter of the training.
        generator_width: channels of the first convolution of generator and discriminator.
        adversary_lr: learning rate of both (Adam, betas 0.5 and 0.999), decayed together with the student's.

    Raises:
        ACKDError: for a value that is out of its range.
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
        if not classifiers:
            raise ACKDError("classifiers is empty in method ACN; give a list of at least one, such as ['peer']")
        for name in classifiers:
            if re.match(r"D\d|last$", name):
                raise ACKDError(
                    f"classifiers names {name!r} in method ACN, a branch of the student; name whole networks, such as "
                    "peer"
                )
        if residual == "learned" and rho in (0, 1):
            raise ACKDError(f"rho is {rho} in method ACN with residual=learned; it must be above 0 and below 1")
        self.branches = tuple(classifiers)
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
        self.generates = weight_generated > 0
        self.epoch = 0
        self.knows_range = False
        self._made: tuple[Tensor, Tensor] | None = None  # images and what was made of them, between two players' steps
        self.generator: Generator | None = None
        self.image_discriminator: ImageDiscriminator | None = None
        self.classifier_nets: nn.Module | None
        self.keep_outside("classifier_nets", None)

    # ---------------------------------------------------------------- before the fit

    def build(self, networks: Networks) -> None:
        """Create generator and discriminator where they are needed.

        Args:
            networks: The student's network is run on generated images, which keep the range of its inputs.

        Raises:
            ACKDError: If the student has no peer.
        """
        student = networks.student
        self.keep_outside("classifier_nets", networks.student_network)
        self.knows_range = networks.pixel_range is not None
        if not student.branches:
            raise ACKDError(
                "method ACN needs two classifiers or more and the student has no peer; name one in `classifiers`"
            )
        if not self.generates:
            return
        low, high = networks.pixel_range or ((-1.0,) * 3, (1.0,) * 3)
        width = self.generator_width
        self.generator = Generator(low, high, width=width, residual=self.residual, rho=self.rho)
        if self.weight_gan:
            self.image_discriminator = ImageDiscriminator(len(low), width=width)

    def begin_fit(self, fit: FitInfo) -> None:
        """Fit the default warm-up to a short training, and warn about what would not work as expected.

        Args:
            fit: Its number of epochs is read.
        """
        if self.generator is not None and not self.knows_range:
            warnings.warn(
                "method ACN does not know the range of the images and takes -1 to 1 for it; pass mean and std of the "
                "data to the module",
                stacklevel=2,
            )
        epochs = fit.epochs
        if epochs is None:
            return
        if self.given_warmup is None:
            self.warmup_epochs = min(_WARMUP, epochs // 4)
        elif self.generates and self.warmup_epochs >= epochs:
            warnings.warn(
                f"method ACN makes no images: warmup_epochs is {self.warmup_epochs} of {epochs} epochs; lower it",
                stacklevel=2,
            )

    def set_epoch(self, epoch: int) -> None:
        """Know the epoch, for the warm-up and the noise.

        Args:
            epoch: from 0.
        """
        self.epoch = epoch

    # ---------------------------------------------------------------- generated images

    @property
    def is_searching(self) -> bool:
        """Whether images are generated in this epoch."""
        return self.generator is not None and self.epoch >= self.warmup_epochs

    def make(self, batch: Batch) -> Tensor:
        """Images that the generator makes of a batch's, in this epoch.

        Args:
            batch: images with their indices, which the noise depends on.

        Returns:
            ``B x C x H x W``; the gradient flows into the generator.

        Raises:
            ACKDError: without a generator.
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
        """Terms ``ce``, ``ce_aux``, ``mutual`` and ``generated``; arguments as in the base class.

        ``generated`` reaches the classifiers, not the generator, and is 0 in warm-up. It runs the classifiers a second
        time: normalised by the statistics of the generated batch, while the running statistics, which evaluation and
        export use, remain those of real images.
        """
        logits = all_logits(student)
        return {
            "ce": cross_entropy(student.logits, batch.target),
            "ce_aux": torch.stack([cross_entropy(each, batch.target) for each in logits[1:]]).sum(),
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
        labelled = torch.stack([cross_entropy(each, batch.target) for each in logits]).sum()
        return labelled + mutual_loss(logits, temperature=self.temperature)

    # ---------------------------------------------------------------- adversarial phase

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        """Return Adam for discriminator and generator, in this order; none when no images are generated."""
        networks = {"image_discriminator": self.image_discriminator, "generator": self.generator}
        return {
            name: torch.optim.Adam(network.parameters(), lr=self.adversary_lr, betas=(0.5, 0.999))
            for name, network in networks.items()
            if network is not None
        }

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Loss of the discriminator or the generator; None in warm-up.

        Args:
            name: ``image_discriminator`` or ``generator``.
            student: Not used; the classifiers are run on generated images.
            teacher: Not used.
            batch: Images, targets and indices.
        """
        if not self.is_searching:
            return None
        return self._generator_loss(batch) if name == "generator" else self._discriminator_loss(batch)

    def _discriminator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.image_discriminator is not None
        made = self.make(batch)  # with its graph: the generator's turn is next, and it is the same until then
        self._made = (batch.image, made)
        real, fake = self.image_discriminator(torch.cat([batch.image, made.detach()])).chunk(2)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        accuracy = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        return loss, {"disc_loss": loss.detach(), "disc_acc": accuracy}

    def _generator_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.generator is not None
        classifiers, discriminator = self._classifiers(), self.image_discriminator
        there, self._made = self._made, None
        made = there[1] if there is not None and there[0] is batch.image else self.make(batch)
        with bystanders(classifiers, *([discriminator] if discriminator is not None else [])):
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
        """Mean of all classifiers' logits.

        Args:
            student: output with peers.

        Returns:
            ``B x K`` float32.
        """
        return torch.stack([each.float() for each in all_logits(student)]).mean(dim=0)

    def statistics(self, student: NetOutput) -> dict[str, Tensor]:
        """Divergence of all classifiers on real images, in nats and as the share of images that divide them.

        Args:
            student: output with peers.
        """
        logits = all_logits(student)
        return {"divergence_js": js_divergence(logits).mean(), "divergence_rate": disagreement(logits)}

    @torch.no_grad()
    def examples(self, batch: Batch) -> Examples | None:
        """Generated images with the classifiers' answers, in evaluation mode; None in warm-up and without a generator.

        Args:
            batch: of validation data.
        """
        if not self.is_searching:
            return None
        classifiers, made = self._classifiers(), self.make(batch)
        with bystanders(classifiers):
            before, after = (all_logits(classifiers(each)) for each in (batch.image, made))
        names = [f"{number} {name}" for number, name in enumerate(("student", *(self.branches or ())))]
        answers = [
            torch.stack([first.argmax(dim=1), second.argmax(dim=1)])
            for first, second in zip(before, after, strict=True)
        ]
        return Examples(batch.image, made, dict(zip(names, answers, strict=True)), batch.target)


def all_logits(student: NetOutput) -> list[Tensor]:
    """Logits of all classifiers, the student's first.

    Args:
        student: output with peers.

    Returns:
        ``B x K`` each.
    """
    return [student.logits, *(branch.logits for branch in student.branches)]
