"""Readings of ACKD that are measured, and not part of the package.

``tables/tiny100_screen.yaml``, ``tables/tiny100_readings.yaml`` and ``tables/confirm.yaml`` have their rows.

Run ``ackd`` with this folder on ``PYTHONPATH``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ackd_lightning import Batch
from ackd_lightning.functional import kl_divergence
from ackd_lightning.methods import ACKD
from ackd_lightning.methods.base import Networks
from ackd_lightning.models.copies import clone
from ackd_lightning.types import NetOutput
from ackd_lightning.validation import NonNegativeInt, Range


class ACKDVariant(ACKD):
    """ACKD with other sources and schedules of Eq. 6, and with a group of mean probabilities.

    Args:
        plain_target: Whether Eq. 6 reads the logits as they are where ``standardize`` standardises the others.
        mix: What attention weighs in Eq. 3: ``logits`` (paper), or ``probabilities`` at the temperature of Eq. 1.
        target_start_epoch: First epoch in which Eq. 6 acts.
        target_warmup_epochs: Epochs over which the weight of Eq. 6 grows from 0 after that.
        average_decay: Decay of an average of the student's weights whose group is the source of Eq. 6, with its
            BatchNorm in evaluation mode. None for the group itself.
        ackd: Arguments of [`ACKD`][ackd_lightning.methods.ACKD].
    """

    def __init__(
        self,
        *,
        plain_target: bool = False,
        mix: Literal["logits", "probabilities"] = "logits",
        target_start_epoch: NonNegativeInt = 0,
        target_warmup_epochs: NonNegativeInt = 0,
        average_decay: Annotated[float, Range(0, 1)] | None = None,
        **ackd: Any,
    ) -> None:
        super().__init__(**ackd)
        self.plain_target, self.mix = plain_target, mix
        self.target_start_epoch, self.target_warmup_epochs = target_start_epoch, target_warmup_epochs
        self.average_decay = average_decay
        self.lambda_kd_target = self.loss_weights["kd_target"]
        self.average: nn.Module | None = None
        self.student: nn.Module | None = None

    def build(self, networks: Networks) -> None:
        """Also copy the student for ``average_decay``; arguments as in `ACKD`."""
        super().build(networks)
        if self.average_decay is not None and networks.student_network is not None:
            self.keep_outside("student", networks.student_network)
            self.average = clone(networks.student_network).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ACKDVariant:
        """Switch the mode of everything but the averaged network."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the weight of Eq. 6; arguments as in `ACKD`."""
        super().set_epoch(epoch)
        since = epoch - self.target_start_epoch
        grown = min(1.0, since / self.target_warmup_epochs) if self.target_warmup_epochs else 1.0
        self.loss_weights["kd_target"] = self.lambda_kd_target * (grown if since >= 0 else 0.0)

    def ensemble(self, student: NetOutput) -> Tensor:
        """Return logits whose softmax at the temperature is the group's distribution; arguments as in `ACKD`."""
        if self.mix == "logits":
            return super().ensemble(student)
        logs = torch.stack([(each.logits.float() / self.temperature).log_softmax(dim=1) for each in student.branches])
        weights = self.attention_weights(student).clamp_min(1e-12).log().T[:, :, None]
        return self.temperature * torch.logsumexp(weights + logs, dim=0)

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of `ACKD`, with the chosen source of Eq. 6; arguments as there."""
        terms = super().forward(student, teacher, batch)
        if self.average is None and not self.plain_target:
            return terms
        if self.average is None:
            source = self.ensemble(student)
        else:
            with torch.no_grad():
                source = self.ensemble(self.average(batch.image))
        if self.detach_group:
            source = source.detach()
        if self.plain_target:
            terms["kd_target"] = kl_divergence(
                student.logits,
                source,
                temperature=self.temperature_target,
                direction=self.direction_target,
                scale_temperature=self.scale_temperature,
            )
        else:
            terms["kd_target"] = self._kl(
                student.logits, source, self.direction_target, temperature=self.temperature_target
            )
        return terms

    @torch.no_grad()
    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Move the averaged weights towards the student's; arguments as in `ACKD`."""
        super().update(student, teacher, batch)
        if self.average is None or self.average_decay is None or self.student is None:
            return
        for mine, theirs in zip(self.average.state_dict().values(), self.student.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs.to(mine.dtype), 1 - self.average_decay)
            else:
                mine.copy_(theirs)
