r"""AI-KD. H. Kim et al.: Adversarial learning and Implicit regularization for self-Knowledge Distillation, 2022.

(arXiv:2211.10938.) The student learns from itself in three ways: from a pretrained network of its own architecture
(*deterministic* knowledge), from its predictions in the previous epoch (*progressive* knowledge), and by fooling a
discriminator that tells the predictions of the pretrained network from its own. This is what the abstract states; the
full text was not available to us. The equations, networks and numbers below are choices of this package.

The progressive part is PS-KD (K. Kim et al.: Self-Knowledge Distillation with Progressive Refinement of Targets, 2021).
In epoch t of E, counted from 0, with \(\alpha_t = \alpha_T (t + 1) / E\) and \(q = (1 - \alpha_t)\,y
+ \alpha_t\,p^{t-1}\) (y one-hot, also in place of \(p^{t-1}\) in epoch 0):

* \(L = w_{ce}\,\mathrm{CE}(q, p^s) + w_{det}\,\tau^2\,\mathrm{KL}(p^{pre}_\tau \| p^s_\tau) + w_{adv}\,L_{adv}\)
* \(L_{adv} = \mathbb{E}[-\log D(p^s)]\), while \(D\) lowers
  \(\mathbb{E}[-\log D(p^{pre})] + \mathbb{E}[-\log(1 - D(p^s))]\)
* with ``adversarial_form="wgan_gp"``: \(L_{adv} = -\mathbb{E}\,D(p^s)\), while \(D\) lowers
  \(\mathbb{E}\,D(p^s) - \mathbb{E}\,D(p^{pre}) + \gamma\,\mathbb{E}(\|\nabla D(\hat p)\| - 1)^2\), \(\hat p\) on the
  line between both

CE(q, ·) is linear in q and appears here as two terms, ``ce`` and ``progressive``. Without the second and third part of
the loss this is PS-KD (config ``pskd``); with \(\alpha_T = 0\) in addition it is plain training, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss, whole_batch
from ackd_lightning.methods.aikd_networks import PredictionDiscriminator, gradient_penalty, soft_cross_entropy
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.methods.rows import check_rows, last_of
from ackd_lightning.models.copies import clone
from ackd_lightning.random import stateless_uniform
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import Fraction, NonNegative, Positive, Range

_STREAM = 0x41494B44  # keeps these random numbers apart from all others


class AIKD(Method):
    """Self-distillation from a pretrained network, from the previous epoch, and through a discriminator.

    The teacher is the pretrained network: the student's own architecture, trained with cross-entropy. (Any network with
    the same classes is allowed, but then the student does not learn from itself.) A term whose weight is 0 is not
    computed and is 0; without ``det`` and ``adv`` the method has no teacher.

    The student of the previous epoch is either a copy in evaluation mode, run on the augmented images of the batch, or
    a table of its predictions during training by ``Batch.index``. Each image is used once per epoch, so one row per
    image is enough: it is read before it is written. Copy and table are part of a checkpoint, with the epoch that they
    belong to, so that a resumed fit copies the student at the right time.

    Args:
        previous: Source of the previous epoch's predictions: ``snapshot`` (a copy of the student, taken when an epoch
            begins) or ``table`` (as in PS-KD; needs data with an index).
        weight_ce: Weight of CE(q, p), which is ``ce`` and ``progressive`` together.
        weight_progressive: Share alpha_T of the previous epoch in the target q when training ends; 0.8 in PS-KD.
        weight_det: Weight of the distillation from the pretrained network.
        weight_adv: Weight of the student's adversarial term.
        temperature: Temperature tau of ``det``; all other terms have temperature 1.
        adversarial_form: Adversarial loss: ``gan`` (cross-entropy, non-saturating for the student) or ``wgan_gp``.
        gradient_penalty: Weight gamma of the gradient penalty, for ``wgan_gp`` only.
        discriminator_inputs: Predictions that the discriminator reads: ``probabilities`` or ``logits``.
        discriminator_hidden: Width of the hidden layers of the discriminator.
        discriminator_lr: Learning rate of the discriminator's Adam optimizer.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> method = AIKD(weight_progressive=0.5)
        >>> method.begin_fit(FitInfo(epochs=10))
        >>> method.set_epoch(4)  # half of the training
        >>> method.loss_weights
        {'ce': 0.75, 'progressive': 0.25, 'det': 1.0, 'adv': 0.1}
    """

    replicated_buffers = ("epoch_begun", "table")

    def __init__(
        self,
        *,
        previous: Literal["snapshot", "table"] = "snapshot",
        weight_ce: NonNegative = 1.0,
        weight_progressive: Fraction = 0.8,
        weight_det: NonNegative = 1.0,
        weight_adv: NonNegative = 0.1,
        temperature: Positive = 4.0,
        adversarial_form: Literal["gan", "wgan_gp"] = "gan",
        gradient_penalty: NonNegative = 10.0,
        discriminator_inputs: Literal["probabilities", "logits"] = "probabilities",
        discriminator_hidden: Annotated[int, Range(1, 65536)] = 256,
        discriminator_lr: Positive = 1e-4,
    ) -> None:
        super().__init__()
        self.previous = previous
        self.weight_ce, self.weight_progressive = weight_ce, weight_progressive
        self.weight_det, self.weight_adv = weight_det, weight_adv
        self.temperature, self.adversarial_form, self.gamma = temperature, adversarial_form, gradient_penalty
        self.discriminator_inputs, self.discriminator_hidden = discriminator_inputs, discriminator_hidden
        self.discriminator_lr = discriminator_lr
        self.teacher = "logits" if weight_det > 0 or weight_adv > 0 else "none"
        self.student: nn.Module | None
        self.keep_outside("student", None)
        self.snapshot: nn.Module | None = None
        self.discriminator: PredictionDiscriminator | None = None
        self.epoch_begun: Tensor
        self.register_buffer("epoch_begun", torch.zeros((), dtype=torch.int64))
        self.table: Tensor | None
        self.register_buffer("table", torch.zeros(0, 0) if previous == "table" and weight_progressive > 0 else None)
        self.labels = "mixed" if self.table is None else "smoothed"
        self.epoch = 0  # the same as epoch_begun, without waiting for a GPU
        self.total_epochs: int | None = None
        self._targets, self._checked = torch.zeros(0, dtype=torch.int64), False
        self._weigh()

    def build(self, networks: Networks) -> None:
        """Copy the student for ``previous="snapshot"``, and create the discriminator.

        Args:
            networks: Networks of the training, of which the student is read.
        """
        student = networks.student
        if self.previous == "snapshot" and self.weight_progressive > 0 and networks.student_network is not None:
            self.keep_outside("student", networks.student_network)
            self.snapshot = clone(networks.student_network).requires_grad_(False).eval()
        if self.table is not None:
            self.table = self.table.new_zeros(len(self.table), student.num_classes)
        if self.weight_adv > 0:
            self.discriminator = PredictionDiscriminator(student.num_classes, self.discriminator_hidden)

    def train(self, mode: bool = True) -> AIKD:
        """Switch the mode of everything but the student's copy, which stays in evaluation mode."""
        super().train(mode)
        if self.snapshot is not None:
            self.snapshot.eval()
        return self

    # ---------------------------------------------------------------- the previous epoch

    def begin_fit(self, fit: FitInfo) -> None:
        """Store the number of epochs, and create the table; a table of the right size is kept.

        Args:
            fit: Information about the fit, of which epochs are read, and targets for ``previous="table"``.
        """
        self.total_epochs = fit.epochs or self.total_epochs
        if self.table is None:
            return
        targets = fit.required_targets(self)
        self._targets, self._checked = targets.to("cpu", torch.int64), False
        if len(self.table) != len(targets):
            self.table = self.table.new_zeros(len(targets), self.table.shape[1])

    @torch.no_grad()
    def set_epoch(self, epoch: int) -> None:
        """Copy the student when an epoch begins, and clear the table when a training begins.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            ACKDError: If the number of epochs is unknown.
        """
        if self.weight_progressive > 0 and self.total_epochs is None:
            raise ACKDError(
                "the number of epochs, over which method AIKD raises the share of the previous epoch, is unknown; set "
                "trainer.max_epochs, or set weight_progressive to 0"
            )
        if epoch == self.epoch:
            self._weigh()
            return
        if epoch == 0 and self.table is not None:
            self.table.zero_()
        elif epoch > 0 and self.snapshot is not None:
            assert self.student is not None
            for mine, theirs in zip(_tensors(self.snapshot), _tensors(self.student), strict=True):
                mine.copy_(theirs)
        self.epoch_begun.fill_(epoch)
        self.epoch = epoch
        self._weigh()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take the number of images, unless it is known, and the epoch from the checkpoint."""
        stored = state_dict.get(f"{prefix}table")
        if self.table is not None and isinstance(stored, Tensor) and len(stored) != len(self.table):
            if len(self._targets):
                raise ACKDError(
                    f"the checkpoint has {len(stored)} training images for method AIKD and the data have "
                    f"{len(self._targets)}; use the data that it was trained on"
                )
            self.table = self.table.new_zeros(len(stored), self.table.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.epoch, self._checked = int(self.epoch_begun), False

    @torch.no_grad()
    def previous_probabilities(self, batch: Batch) -> Tensor:
        """Return the predictions of the previous epoch; the one-hot label where there is none yet.

        Args:
            batch: Images with targets and indices.

        Returns:
            ``B x K`` float32 without gradient whose rows sum to 1.

        Raises:
            ACKDError: If the method has neither a copy of the student nor a table.
        """
        if self.table is not None:
            rows = self.table[batch.index].float()
            labels = F.one_hot(batch.target, rows.shape[1]).float()
            return torch.where(rows.sum(dim=1, keepdim=True) > 0, rows, labels)
        if self.snapshot is None:
            raise ACKDError("method AIKD has no student to copy; call build with its network")
        output: NetOutput = self.snapshot(batch.image)
        return output.logits.float().softmax(dim=1)

    @torch.no_grad()
    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Write the predictions for the global batch into the table; arguments as in the base class.

        An image that is in the batch twice leaves its last prediction.
        """
        if self.table is None:
            return
        if not self._checked:
            check_rows(batch, self._targets, "AIKD", ", or set previous to snapshot")
            self._checked = True
        index = whole_batch(batch.index)
        rows = whole_batch(student.logits.detach().float().softmax(dim=1)).to(self.table.dtype)
        self.table[index] = rows[last_of(index)]

    # ---------------------------------------------------------------- loss

    def alpha(self) -> float:
        """Return alpha_t, the share of the previous epoch in this epoch's targets, from alpha_T / E to alpha_T."""
        return self.weight_progressive * min(1.0, (self.epoch + 1) / (self.total_epochs or 1))

    def _weigh(self) -> None:
        """Set the weights of this epoch."""
        alpha = self.alpha()
        self.loss_weights = {
            "ce": self.weight_ce * (1 - alpha),
            "progressive": self.weight_ce * alpha,
            "det": self.weight_det,
            "adv": self.weight_adv,
        }

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms ``ce``, ``progressive``, ``det`` and ``adv``; arguments as in the base class.

        Gradients reach the student and, from ``adv``, a discriminator that is not frozen; never the pretrained network
        or the student of the previous epoch.

        Raises:
            ACKDError: If there is a table and ``begin_fit`` was not called, or the indices do not fit.
        """
        ce = cross_entropy(student.logits, batch.labels)
        nothing = torch.zeros((), device=student.logits.device)
        terms = {"ce": ce, "progressive": nothing, "det": nothing, "adv": nothing}
        if self.table is not None and not self._checked:
            check_rows(batch, self._targets, "AIKD", ", or set previous to snapshot")
        if self.weight_progressive > 0:
            first = self.epoch == 0
            terms["progressive"] = (
                ce if first else soft_cross_entropy(student.logits, self.previous_probabilities(batch))
            )
        if self.weight_det > 0:
            assert teacher is not None
            terms["det"] = kd_loss(student.logits, teacher.logits, temperature=self.temperature)
        if self.discriminator is not None:
            verdict: Tensor = self.discriminator(self._view(student))
            terms["adv"] = -verdict.mean() if self.adversarial_form == "wgan_gp" else F.softplus(-verdict).mean()
        return terms

    # ---------------------------------------------------------------- discriminator

    def _view(self, output: NetOutput) -> Tensor:
        """Return the predictions that the discriminator reads."""
        logits = output.logits.float()
        return logits if self.discriminator_inputs == "logits" else logits.softmax(dim=1)

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        """Return Adam with betas 0.5 and 0.999 for the discriminator; none when the weight of ``adv`` is 0."""
        if self.discriminator is None:
            return {}
        parameters = self.discriminator.parameters()
        return {"discriminator": torch.optim.Adam(parameters, lr=self.discriminator_lr, betas=(0.5, 0.999))}

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the discriminator: the pretrained network's predictions are real, the student's are fake.

        Args:
            name: Name of the optimizer, ``discriminator``.
            student: Output of the student, which is detached here.
            teacher: Output of the pretrained network.
            batch: Images whose indices determine where the gradient penalty is measured.

        Returns:
            The loss, and the values ``disc_loss`` and ``disc_acc`` (accuracy; one half is chance). The outputs of a
            ``wgan_gp`` critic have no fixed threshold and are divided at the middle of the two means.
        """
        assert self.discriminator is not None
        assert teacher is not None
        real, fake = self._view(teacher).detach(), self._view(student).detach()
        of_real, of_fake = self.discriminator(real), self.discriminator(fake)
        if self.adversarial_form == "gan":
            loss = F.softplus(-of_real).mean() + F.softplus(of_fake).mean()
            middle = torch.zeros_like(loss)
        else:
            loss = of_fake.mean() - of_real.mean()
            middle = 0.5 * (of_fake.mean() + of_real.mean())
            if self.gamma > 0:
                loss = loss + self.gamma * gradient_penalty(self.discriminator, real, fake, self._shares(batch))
        right = 0.5 * ((of_real > middle).float().mean() + (of_fake <= middle).float().mean())
        return loss, {"disc_loss": loss.detach(), "disc_acc": right}

    def _shares(self, batch: Batch) -> Tensor:
        """Return a number for every image that depends on epoch and index, or a random one for an unknown index."""
        drawn = torch.rand(len(batch.index), device=batch.index.device)
        return torch.where(batch.index >= 0, stateless_uniform(_STREAM, self.epoch, batch.index), drawn)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Return weights and buffers in an order that a network shares with its copies."""
    return [*network.parameters(), *network.buffers()]
