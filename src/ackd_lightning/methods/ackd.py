r"""ACKD. Liu, Huang, Liu: Improved Knowledge Distillation via Adversarial Collaboration, 2021 (arXiv:2111.14356).

Auxiliary learners share the first stages of the student. They learn from the teacher as a group that attention weighs
(Eq. 1 to 3), discriminators compare their features (Eq. 4, 5), and the target learner learns from the group (Eq. 6):

\(L = \lambda_1 L_{kd}^a + \lambda_2 L_{kd}^s + \lambda_3 L_{ad} + \lambda_4 L_{ce}\) (Eq. 7), all \(\lambda = 1\).

The paper leaves much open and contradicts itself in places. Each of these places is an argument of `ACKD`. The
config ``ackd_literal`` follows the printed equations, but for the sign of Eq. 6.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import KLDirection, cross_entropy, kl_per_image, weighted_logits
from ackd_lightning.methods.ackd_attention import AttentionInput, LearnerAttention
from ackd_lightning.methods.ackd_discriminators import DiscriminatorInput, Discriminators
from ackd_lightning.methods.base import Networks, features_of
from ackd_lightning.methods.logits import LogitMethod
from ackd_lightning.methods.warmup import linear_warmup
from ackd_lightning.models.features import require_stages
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, NonNegativeInt, Positive, Range


class ACKD(LogitMethod):
    """Adversarial collaborative knowledge distillation. The auxiliary learners are dropped after training.

    Args:
        branches: Auxiliary learners as ``DnBm`` (Table 7). None for the paper's two, ``D{K}B1`` and ``D{K-1}B2``.
        temperature: Temperature tau of Eq. 1 (not in the paper; 4 in other code of the same authors).
        temperature_target: Temperature of Eq. 6. None for ``temperature``, as in the paper.
        scale_temperature: Whether Eq. 2 and 6 are multiplied by tau squared.
        standardize: Whether to standardise the logits of every image before the divergences read them (not in the
            paper).
        entropy_temperature: Temperature of the entropies that weigh the images in the divergences (EA-KD; not in the
            paper). None for equal weights.
        direction_aux: Divergence of Eq. 2: ``forward`` KL(teacher || group) as is usual, ``reverse`` as printed, or
            ``js``.
        direction_target: Divergence of Eq. 6. The printed equation is minus a KL and *pushes the target away* from the
            group. ``forward`` is KL(group || target), ``reverse`` the printed divergence with its sign corrected.
        teach: Learners that the teacher teaches in Eq. 2: the ``ensemble`` (paper), each of the ``learners`` (mean over
            them), or ``both`` (sum of the two).
        detach_group: Whether the gradient of Eq. 6 stops before the auxiliary learners. The equations do not say so.
        attention: Function g of Eq. 3 (``pooled``, ``scaled``, or the paper's ``flattened``), or ``off`` for the mean
            of the logits.
        attention_hidden: Width of the hidden layer in the MLP of Eq. 3.
        attention_lr_scale: Learning rate of this MLP relative to the student's. With ``flattened`` input and 1.0 one
            learner got all weight within an epoch of a first measurement.
        adversarial: Aim of the learners: ``fool`` the discriminators (minimise Eq. 5, as printed in Eq. 7),
            ``diversify`` (maximise it, the purpose that the text states), or ``off``.
        adversarial_form: Loss of ``fool``: ``minimax`` (as printed) or ``non_saturating`` (flipped labels).
        adversarial_warmup_epochs: Epochs over which lambda_adv grows linearly from 0.
        discriminator_inputs: Features that discriminators read: every position of the ``map``, or ``pooled``.
        discriminator_optimizer: Optimizer of the discriminators: ``sgd`` (momentum 0.9, weight decay 5e-4) or ``adam``
            (betas 0.5 and 0.999).
        discriminator_lr: Learning rate of this optimizer, which follows the student's schedule. None for 1e-3
            with ``adam``. With ``sgd``, None is the student's largest rate if its optimizer is SGD, else the paper's
            0.1.
        lambda_kd_aux: Weight lambda_1 of the distillation from teacher to group (Eq. 2).
        lambda_kd_target: Weight lambda_2 of the distillation from group to target (Eq. 6).
        lambda_adv: Weight lambda_3 of the adversarial term (Eq. 5).
        lambda_ce: Weight lambda_4 of the target learner's cross-entropy.
        lambda_ce_aux: Weight of the auxiliary learners' cross-entropies (their sum); lambda_4 in the paper.
        lambda_direct: Weight of a distillation from teacher to target, which the paper leaves out on purpose.

    Raises:
        ACKDError: If a value is not allowed, or values contradict each other.

    Examples:
        >>> ACKD(lambda_adv=0.5).loss_weights
        {'ce': 1.0, 'ce_aux': 1.0, 'kd_aux': 1.0, 'kd_target': 1.0, 'kd_direct': 0.0, 'adv': 0.5}
    """

    labels = "mixed"

    def __init__(
        self,
        *,
        branches: Sequence[str] | None = None,
        temperature: Positive = 4.0,
        temperature_target: Positive | None = None,
        scale_temperature: bool = True,
        standardize: bool = False,
        entropy_temperature: Positive | None = None,
        direction_aux: KLDirection = "forward",
        direction_target: KLDirection = "forward",
        teach: Literal["ensemble", "learners", "both"] = "ensemble",
        detach_group: bool = False,
        attention: Literal["pooled", "flattened", "scaled", "off"] = "pooled",
        attention_hidden: Annotated[int, Range(1, 65536)] = 128,
        attention_lr_scale: NonNegative = 0.1,
        adversarial: Literal["fool", "diversify", "off"] = "fool",
        adversarial_form: Literal["minimax", "non_saturating"] = "minimax",
        adversarial_warmup_epochs: NonNegativeInt = 0,
        discriminator_inputs: DiscriminatorInput = "map",
        discriminator_optimizer: Literal["sgd", "adam"] = "sgd",
        discriminator_lr: Positive | None = None,
        lambda_kd_aux: NonNegative = 1.0,
        lambda_kd_target: NonNegative = 1.0,
        lambda_adv: NonNegative = 1.0,
        lambda_ce: NonNegative = 1.0,
        lambda_ce_aux: NonNegative = 1.0,
        lambda_direct: NonNegative = 0.0,
    ) -> None:
        super().__init__(standardize=standardize, entropy_temperature=entropy_temperature)
        if branches is not None and len(branches) == 0:
            raise ACKDError("branches is empty in method ACKD; name at least one, such as D3B1, or leave it out")
        if branches is not None and len(branches) == 1 and adversarial != "off":
            raise ACKDError(
                f"branches is {list(branches)} in method ACKD, but Eq. 4 compares learners with each other; "
                "add a second branch or set adversarial to off"
            )
        if teach == "learners" and attention != "off" and (detach_group or lambda_kd_target == 0):
            alone = "detach_group=true" if detach_group else "lambda_kd_target=0"
            raise ACKDError(
                f"attention has nothing to learn from with teach=learners and {alone} in method ACKD; "
                "set attention to off, or teach to both"
            )
        self.branches = None if branches is None else tuple(branches)
        self.compile_modules = () if adversarial == "off" else ("discriminators",)
        self.temperature, self.scale_temperature = temperature, scale_temperature
        self.temperature_target = temperature if temperature_target is None else temperature_target
        self.direction_aux, self.direction_target = direction_aux, direction_target
        self.teach, self.detach_group = teach, detach_group
        self.attention_inputs = attention
        self.attention_hidden, self.lr_scales = attention_hidden, {"attention": attention_lr_scale}
        self.adversarial, self.adversarial_form = adversarial, adversarial_form
        self.adversarial_warmup_epochs = adversarial_warmup_epochs
        self.discriminator_inputs = discriminator_inputs
        self.optimizer_name, self.discriminator_lr = discriminator_optimizer, discriminator_lr
        self.lambda_adv = lambda_adv
        self.loss_weights = {
            "ce": lambda_ce,
            "ce_aux": lambda_ce_aux,
            "kd_aux": lambda_kd_aux,
            "kd_target": lambda_kd_target,
            "kd_direct": lambda_direct,
            "adv": lambda_adv,
        }
        self.attention: nn.Module = nn.Identity()
        self.discriminators: nn.Module = nn.Identity()

    def build(self, networks: Networks) -> None:
        """Create the attention MLP and one discriminator per auxiliary learner.

        Args:
            networks: Shapes and structures of student and teachers.

        Raises:
            ACKDError: If the student has too few auxiliary learners.
        """
        shapes = [
            require_stages(each, "the auxiliary learner", "method ACKD")[-1] for each in networks.student.branches
        ]
        if not shapes or (len(shapes) < 2 and self.adversarial != "off"):
            raise ACKDError(
                f"method ACKD needs {'one branch' if self.adversarial == 'off' else 'two branches'} or more and the "
                f"student has {len(shapes)}; name them in `branches`, or set adversarial to off"
            )
        if self.attention_inputs != "off":
            inputs: AttentionInput = self.attention_inputs
            self.attention = LearnerAttention(shapes, inputs=inputs, hidden=self.attention_hidden)
        if self.adversarial != "off":
            self.discriminators = Discriminators(len(shapes), shapes[0][0], inputs=self.discriminator_inputs)

    def set_epoch(self, epoch: int) -> None:
        """Set lambda_adv, which grows during its warm-up.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.loss_weights["adv"] = self.lambda_adv * linear_warmup(epoch, self.adversarial_warmup_epochs, first=0)

    def attention_weights(self, student: NetOutput) -> Tensor:
        """Return the attention weights of Eq. 3; equal ones when attention is off.

        Args:
            student: Output with M auxiliary learners.

        Returns:
            ``B x M`` float32 whose rows sum to 1.
        """
        if isinstance(self.attention, LearnerAttention):
            weights: Tensor = self.attention([features_of(branch)[-1] for branch in student.branches])
            return weights
        count = len(student.branches)
        return torch.full((student.logits.shape[0], count), 1.0 / count, device=student.logits.device)

    def ensemble(self, student: NetOutput) -> Tensor:
        """Return the logits z of the learning group (Eq. 3).

        Args:
            student: Output with auxiliary learners.

        Returns:
            ``B x K`` float32.
        """
        return weighted_logits(self.attention_weights(student), [branch.logits for branch in student.branches])

    def _kl(
        self, learner: Tensor, target: Tensor, direction: KLDirection, *, temperature: float | None = None
    ) -> Tensor:
        loss = functools.partial(
            kl_per_image,
            temperature=self.temperature if temperature is None else temperature,
            direction=direction,
            scale_temperature=self.scale_temperature,
        )
        return self.mean_loss(loss, learner, target)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of Eq. 7 without their lambdas.

        Args:
            student: Output of the student with its auxiliary learners.
            teacher: Output of the teacher.
            batch: Images and targets.

        Returns:
            ``ce`` and ``ce_aux`` (cross-entropies of the target and, summed, of the learners), ``kd_aux`` (Eq. 2),
            ``kd_target`` (Eq. 6), ``kd_direct`` (teacher to target, not in the paper), and ``adv`` (Eq. 5 as the
            learners minimise it; the discriminators are frozen in this step).
        """
        assert teacher is not None
        group = self.ensemble(student)
        terms = {
            "ce": cross_entropy(student.logits, batch.labels),
            "ce_aux": torch.stack([cross_entropy(each.logits, batch.labels) for each in student.branches]).sum(),
        }
        taught = torch.zeros((), device=group.device)
        if self.teach != "learners":
            taught = taught + self._kl(group, teacher.logits, self.direction_aux)
        if self.teach != "ensemble":
            each_kl = [self._kl(each.logits, teacher.logits, self.direction_aux) for each in student.branches]
            taught = taught + torch.stack(each_kl).mean()
        terms["kd_aux"] = taught
        source = group.detach() if self.detach_group else group
        terms["kd_target"] = self._kl(
            student.logits, source, self.direction_target, temperature=self.temperature_target
        )
        terms["kd_direct"] = self._kl(student.logits, teacher.logits, "forward")
        terms["adv"] = self._learners_loss(student)
        return terms

    def _learners_loss(self, student: NetOutput) -> Tensor:
        if self.adversarial == "off":
            return torch.zeros((), device=student.logits.device)
        flipped = self.adversarial == "fool" and self.adversarial_form == "non_saturating"
        features = [features_of(branch)[-1] for branch in student.branches]
        value: Tensor = self.discriminators(features, flipped=flipped)[0]
        return -value if flipped or self.adversarial == "diversify" else value

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        """Return the discriminators' optimizer, SGD with momentum or Adam; none with ``adversarial="off"``."""
        parameters = list(self.discriminators.parameters())
        if not parameters:
            return {}
        rate = self.discriminator_lr
        if self.optimizer_name == "adam":
            return {"discriminators": Adam(parameters, lr=1e-3 if rate is None else rate, betas=(0.5, 0.999))}
        if rate is not None:
            return {"discriminators": SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4)}
        group = {"params": parameters, "lr_scale": 1.0}  # of the rate of a student with SGD
        return {"discriminators": SGD([group], lr=0.1, momentum=0.9, weight_decay=5e-4)}

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the discriminators, which maximise L_ad (Eq. 4 and 5) on detached features.

        Args:
            name: Name of the optimizer, ``discriminators``.
            student: Output of the student.
            teacher: Unused.
            batch: Unused.

        Returns:
            ``-L_ad`` and the values ``disc_loss`` and ``disc_acc``.
        """
        value, accuracy = self.discriminators([features_of(branch)[-1].detach() for branch in student.branches])
        loss: Tensor = -value
        return loss, {"disc_loss": loss.detach(), "disc_acc": accuracy}

    def statistics(self, student: NetOutput) -> dict[str, Tensor]:
        """Return the mean attention weight of every learner and the entropy of the weights in nats.

        Args:
            student: Output with auxiliary learners.
        """
        weights = self.attention_weights(student)
        entropy = -(weights * weights.clamp_min(1e-12).log()).sum(dim=1).mean()
        shares = {f"attention_weight_aux{number}": share for number, share in enumerate(weights.mean(dim=0), start=1)}
        return {**shares, "attention_entropy": entropy}
