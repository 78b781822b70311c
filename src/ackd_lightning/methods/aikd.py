r"""AI-KD. H. Kim et al.: Adversarial learning and Implicit regularization for self-Knowledge Distillation, 2022.

(arXiv:2211.10938.) The student learns from itself, three times over: from a pretrained network of its own
architecture (*deterministic* knowledge), from what it predicted an epoch ago (*progressive* knowledge), and from a
discriminator that tells the pretrained network's predictive distributions from its own, which it shall fool. That much
the abstract says, and no more of the paper was at hand: the equations below, the networks and the numbers are choices
of this package.

The progressive part is PS-KD (K. Kim et al.: Self-Knowledge Distillation with Progressive Refinement of Targets, 2021).
In epoch t of E, counted from 0, with \(\alpha_t = \alpha_T (t + 1) / E\) and \(q = (1 - \alpha_t)\,y
+ \alpha_t\,p^{t-1}\) (y one-hot, also in place of \(p^{t-1}\) in epoch 0):

* \(L = w_{ce}\,\mathrm{CE}(q, p^s) + w_{det}\,\tau^2\,\mathrm{KL}(p^{pre}_\tau \| p^s_\tau) + w_{adv}\,L_{adv}\)
* \(L_{adv} = \mathbb{E}[-\log D(p^s)]\), while \(D\) lowers
  \(\mathbb{E}[-\log D(p^{pre})] + \mathbb{E}[-\log(1 - D(p^s))]\)
* with ``adversarial_form="wgan_gp"``: \(L_{adv} = -\mathbb{E}\,D(p^s)\), while \(D\) lowers
  \(\mathbb{E}\,D(p^s) - \mathbb{E}\,D(p^{pre}) + \gamma\,\mathbb{E}(\|\nabla D(\hat p)\| - 1)^2\), \(\hat p\) on the
  line between both

CE(q, ·) is linear in q, so it stands here as two terms, ``ce`` and ``progressive``. Without the second and third part
of the loss this is PS-KD (config ``pskd``), with \(\alpha_T = 0\) besides it is plain training, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss, whole_batch
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.random import keyed_uniform
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import Fraction, NonNegative, Positive, Range

_STREAM = 0x41494B44  # keeps the draws apart from others with equal keys


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    r"""Cross-entropy with soft targets, \(-\sum_k q_k \log p_k\), mean over the batch.

    Args:
        logits: ``B x K``; the gradient flows into them.
        probabilities: ``B x K``, rows that sum to 1; no gradient flows into them.

    Returns:
        Scalar float32, in nats.
    """
    return -(probabilities.detach().float() * F.log_softmax(logits.float(), dim=1)).sum(dim=1).mean()


def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    r"""\((\|\nabla_x D(x)\| - 1)^2\) between pairs of real and fake, mean over the batch (Gulrajani et al. 2017).

    The gradient flows into the critic only.

    Args:
        critic: maps ``B x K`` to ``B``, each row by itself.
        real: ``B x K`` float32.
        fake: ``B x K`` float32.
        share: ``B`` in [0, 1], of the real one in the point where the slope is measured.

    Returns:
        Scalar float32.
    """
    between = torch.lerp(fake.detach(), real.detach(), share[:, None]).requires_grad_()
    with torch.autocast(between.device.type, enabled=False):  # which would reach the backward pass, too
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    excess: Tensor = torch.linalg.vector_norm(slope, dim=1) - 1
    return excess.square().mean()


class PredictionDiscriminator(nn.Module):
    """Says whether a prediction comes from the pretrained network: MLP K, hidden, hidden, 1 with LeakyReLU of 0.2.

    It computes in float32, under mixed precision, too.

    Args:
        num_classes: K.
        hidden: width of both hidden layers.
    """

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(entering, leaving) for entering, leaving in ((num_classes, hidden), (hidden, hidden), (hidden, 1))
        )

    def forward(self, predictions: Tensor) -> Tensor:
        """Logits, above 0 for the pretrained network.

        Args:
            predictions: ``B x K``.

        Returns:
            ``B`` float32.
        """
        first, *others = self.layers
        with torch.autocast(predictions.device.type, enabled=False):
            value = _linear(first, predictions.float())
            for layer in others:
                value = _linear(layer, F.leaky_relu(value, 0.2))
        return value[:, 0]


def _linear(layer: nn.Module, value: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return F.linear(value, layer.weight.float(), layer.bias.float())


class AIKD(Method):
    """Self-distillation from a pretrained network, from the epoch before, and through a discriminator.

    The teacher is the pretrained network: the student's own architecture, trained before with cross-entropy. (Any
    network of the same classes will do, but then the student does not learn from itself.) A term whose weight is 0 is
    not computed and reads 0; without ``det`` and ``adv`` there is no teacher.

    The student of the epoch before is a copy of it, run in evaluation mode on the batch's own augmented images, or a
    table of what it predicted while it trained, by ``Batch.index``. A sample is visited once an epoch, so one row
    each is enough: it is read in this epoch before it is written. Copy or table are part of a checkpoint, with the
    epoch that they belong to, so that a resumed fit knows whether to copy anew.

    Args:
        previous: ``snapshot`` (a copy of the student, taken when an epoch begins) or ``table`` (as PS-KD has it;
            needs data that give an index).
        weight_ce: of CE(q, p), that is of ``ce`` and ``progressive`` together.
        weight_progressive: alpha_T, share of the epoch before in the target q when training ends; 0.8 in PS-KD.
        weight_det: of the distillation from the pretrained network.
        weight_adv: of the game as the student plays it.
        temperature: tau of ``det``; everything else is at 1.
        adversarial_form: ``gan`` (cross-entropy, non-saturating for the student) or ``wgan_gp``.
        gradient_penalty: gamma, of ``wgan_gp`` only.
        discriminator_inputs: ``probabilities`` or ``logits``.
        discriminator_hidden: width of the discriminator.
        discriminator_lr: of its Adam optimizer.

    Raises:
        ACKDError: for a value that is out of its range.
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
        self.epoch = 0  # what epoch_begun says, without waiting for a GPU
        self.total_epochs: int | None = None
        self._targets, self._checked = torch.zeros(0, dtype=torch.int64), False
        self._weigh()

    def build(self, networks: Networks) -> None:
        """Copy the student, where the copy stands for the epoch before, and create the discriminator.

        Args:
            networks: The student's network is copied; its classes are those of the discriminator and the table.
        """
        student = networks.student
        if self.previous == "snapshot" and self.weight_progressive > 0 and networks.student_network is not None:
            self.keep_outside("student", networks.student_network)
            self.snapshot = copy.deepcopy(networks.student_network).requires_grad_(False).eval()
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

    # ---------------------------------------------------------------- the epoch before

    def begin_fit(self, fit: FitInfo) -> None:
        """Take the length over which alpha grows, and create the table; keep one for as many images.

        Args:
            fit: Its number of epochs is read, and its targets where there is a table.
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
        """Copy the student when an epoch begins; forget an earlier training when epoch 0 does.

        Args:
            epoch: from 0.

        Raises:
            ACKDError: when the number of epochs is not known.
        """
        if self.weight_progressive > 0 and self.total_epochs is None:
            raise ACKDError(
                "method AIKD lets the share of the epoch before grow until training ends and does not know when that "
                "is; limit the training by trainer.max_epochs, or set weight_progressive to 0"
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
        """Take the number of images from the checkpoint when nobody has told it, and the epoch that it was made in."""
        stored = state_dict.get(f"{prefix}table")
        if self.table is not None and isinstance(stored, Tensor) and len(stored) != len(self.table):
            if len(self._targets):
                raise ACKDError(
                    f"the checkpoint keeps {len(stored)} training images for method AIKD and the data have "
                    f"{len(self._targets)}; go on with the data that it was trained on"
                )
            self.table = self.table.new_zeros(len(stored), self.table.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.epoch, self._checked = int(self.epoch_begun), False

    def _check(self, batch: Batch) -> None:
        rows = len(self._targets)
        if not rows:
            raise ACKDError("method AIKD does not know the training images yet; call begin_fit with their targets")
        index, target = batch.index.cpu(), batch.target.cpu()
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= rows:
            raise ACKDError(
                f"batch.index goes from {low} to {high} and the table of method AIKD has {rows} training images; the "
                "data must give (image, target, index) with the image's position in the training set, or set previous "
                "to snapshot"
            )
        if not torch.equal(self._targets[index], target):
            raise ACKDError(
                "batch.index does not fit batch.target in method AIKD: the class of an image differs from the one "
                "that `train_targets` has for its index; both must count the same training set"
            )

    @torch.no_grad()
    def previous_probabilities(self, batch: Batch) -> Tensor:
        """What the student of the epoch before predicts; the label's one-hot vector where it predicts nothing yet.

        Args:
            batch: the images with targets and indices.

        Returns:
            ``B x K`` float32, rows sum to 1, without gradient.

        Raises:
            ACKDError: when the method was given neither a student to copy nor the training images.
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
        """Write the rows of the whole batch into the table; arguments as in the base class.

        An image that stands in the batch twice leaves its last prediction.
        """
        if self.table is None:
            return
        if not self._checked:
            self._check(batch)
            self._checked = True
        index = whole_batch(batch.index)
        rows = whole_batch(student.logits.detach().float().softmax(dim=1)).to(self.table.dtype)
        places = torch.arange(len(index), device=index.device)
        last = torch.where(index[:, None] == index[None, :], places, -1).amax(dim=1)
        self.table[index] = rows[last]

    # ---------------------------------------------------------------- loss

    def alpha(self) -> float:
        """Share of the epoch before in this epoch's targets: alpha_t, from alpha_T / E to alpha_T."""
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
        """Terms ``ce``, ``progressive``, ``det`` and ``adv``; arguments as in the base class.

        The gradient reaches the student and, in ``adv``, the discriminator unless that is frozen; never the pretrained
        network nor the student of the epoch before.

        Raises:
            ACKDError: when there is a table and ``begin_fit`` was not called, or indices do not fit.
        """
        ce = cross_entropy(student.logits, batch.target)
        nothing = torch.zeros((), device=student.logits.device)
        terms = {"ce": ce, "progressive": nothing, "det": nothing, "adv": nothing}
        if self.table is not None and not self._checked:
            self._check(batch)
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

    # ---------------------------------------------------------------- game

    def _view(self, output: NetOutput) -> Tensor:
        """What the discriminator sees of a network."""
        logits = output.logits.float()
        return logits if self.discriminator_inputs == "logits" else logits.softmax(dim=1)

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        """Return the discriminator's Adam with betas 0.5 and 0.999; none when ``adv`` has no weight."""
        if self.discriminator is None:
            return {}
        parameters = self.discriminator.parameters()
        return {"discriminator": torch.optim.Adam(parameters, lr=self.discriminator_lr, betas=(0.5, 0.999))}

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's side: the pretrained network's predictions are real, the student's are not.

        Args:
            name: ``discriminator``.
            student: detached here.
            teacher: the pretrained network's output.
            batch: its indices are keys of where a gradient penalty is measured.

        Returns:
            The loss, and the log entries ``disc_loss`` and ``disc_acc``: share of right answers, one half is guessing.
            (A critic of ``wgan_gp`` has no zero of its own: its answers are cut in the middle between both means.)
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
        """A number for every image, by epoch and index; by the step's generator where the index is not known."""
        drawn = torch.rand(len(batch.index), device=batch.index.device)
        return torch.where(batch.index >= 0, keyed_uniform(_STREAM, self.epoch, batch.index), drawn)


def _tensors(network: nn.Module) -> list[Tensor]:
    """Weights and buffers in an order that a network shares with its copies."""
    return [*network.parameters(), *network.buffers()]
