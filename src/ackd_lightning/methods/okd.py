r"""OKD. Rao, Liu, Lin, Ding, Li, Tao, Zhang: Exploring and Enhancing the Transfer of Distribution in KD, 2024.

The paper distils language models; here it is carried over to image classification (arXiv:2409.12512). The teacher
stays frozen, but for small online modules inside it that train together with the student and adapt the teacher's
distribution to it. After each stage n of the teacher:

\(F_n \leftarrow F_n + U_n\,\mathrm{ReLU}(V_n F_n + v_n) + u_n,\quad V_n: C \to C / r,\; U_n: C / r \to C\)

at every position. U starts at 0, so that the first prediction is the pretrained teacher's. With \(p^{t}\) of the
teacher with its modules and sg a stopped gradient:

* student: \(w_{ce}\,\mathrm{CE}(z^s, y) + w_{kd}\,\mathrm{KL}_\tau(\mathrm{sg}\,p^t \| p^s)\)
* modules: \(w_{ce}'\,\mathrm{CE}(z^t, y) + w_{kd}'\,\mathrm{KL}_\tau(\mathrm{sg}\,p^s \| p^t)\)

The full text was not available to us. The abstract says this much: small modules in the teacher, trained concurrently
with few parameters, that adapt to the student's distribution. Ours, for networks that classify images: where the
modules are and what they compute, both losses of the modules, KL with \(\tau = 4\), and all weights, which are 1. What
the paper says about sampling text has no counterpart here. The given teacher is not changed; the modules are part of
the method's state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy, kd_loss
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.methods.running import only_teacher, require_logits
from ackd_lightning.models.features import require_stages
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative, Positive, PositiveInt


class OnlineModule(nn.Module):
    """Residual bottleneck on the channels of a map, which starts as the identity.

    Args:
        channels: Channels C of the map.
        reduction: C divided by the channels in between.

    Examples:
        >>> module, feature = OnlineModule(8, 4), torch.randn(2, 8, 4, 4)
        >>> torch.equal(module(feature), feature)
        True
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.channels = channels
        self.enter = nn.Linear(channels, max(1, channels // reduction))
        self.leave = nn.Linear(max(1, channels // reduction), channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """Return the feature plus the module's correction.

        Args:
            feature: ``B x C x H x W``, ``B x H x W x C`` or ``B x N x C``.
        """
        first = feature.dim() == 4 and feature.shape[1] == self.channels
        last = feature.movedim(1, -1) if first else feature
        change = self.leave(torch.relu(self.enter(last.to(self.enter.weight.dtype))))
        change = change.movedim(-1, 1) if first else change
        corrected: Tensor = feature + change.to(feature.dtype)
        return corrected


class OKD(Method):
    """Cross-entropy and KD from a frozen teacher with small modules that train together with the student.

    Args:
        reduction: Ratio r of a stage's channels to those inside its module.
        temperature: Temperature tau of both divergences.
        weight_ce: Weight of the student's cross-entropy.
        weight_kd: Weight of the student's divergence from the teacher.
        weight_ce_teacher: Weight of the teacher's cross-entropy, whose gradient reaches the modules alone.
        weight_kd_teacher: Weight of the teacher's divergence from the student, whose gradient reaches the modules
            alone.

    Raises:
        ACKDError: If a value is not allowed.
    """

    teacher = "own"
    labels = "mixed"

    def __init__(
        self,
        *,
        reduction: PositiveInt = 4,
        temperature: Positive = 4.0,
        weight_ce: NonNegative = 1.0,
        weight_kd: NonNegative = 1.0,
        weight_ce_teacher: NonNegative = 1.0,
        weight_kd_teacher: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.reduction, self.temperature = reduction, temperature
        self.loss_weights = {
            "ce": weight_ce,
            "kd": weight_kd,
            "ce_teacher": weight_ce_teacher,
            "kd_teacher": weight_kd_teacher,
        }
        self.online = nn.ModuleList()
        self.host: FrozenTeacher | None
        self.keep_outside("host", None)

    def build(self, networks: Networks) -> None:
        """Create a module for every stage of the teacher.

        Args:
            networks: Shapes of the teacher.

        Raises:
            ACKDError: If the stages of the teacher are unknown, or there are several teachers.
        """
        stages = require_stages(only_teacher(networks.teachers, "OKD"), "the teacher", "method OKD")
        self.online = nn.ModuleList(OnlineModule(shape[0], self.reduction) for shape in stages[1:])

    def begin_fit(self, fit: FitInfo) -> None:
        """Keep the teacher, in which the modules work.

        Args:
            fit: Information about the fit, of which the teacher is read.

        Raises:
            ACKDError: If the features of the teacher alone are used.
        """
        self.keep_outside("host", require_logits(only_teacher(fit.teachers, "OKD"), "OKD"))

    def adapted(self, image: Tensor) -> NetOutput:
        """Run the teacher with the modules.

        Args:
            image: Images ``B x C x H x W``.

        Returns:
            Output of the teacher; gradients flow into the modules.
        """
        if self.host is None:
            raise ACKDError("method OKD has no teacher yet; call begin_fit before the first step")
        with self._installed(self.host):
            return self.host.with_gradient(image)

    @contextlib.contextmanager
    def _installed(self, teacher: FrozenTeacher) -> Iterator[None]:
        """Install the modules in the teacher, which other methods and users have without them."""
        assert teacher.plan is not None
        handles = [
            teacher.network.get_submodule(name).register_forward_hook(_Correct(module, name))
            for name, module in zip(teacher.plan.features[1:], self.online, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Run the teacher with its modules and return the four terms.

        Args:
            student: Output of the student.
            teacher: Unused.
            batch: Images and targets.
        """
        ours, theirs = student.logits, self.adapted(batch.image).logits
        return {
            "ce": cross_entropy(ours, batch.labels),
            "kd": kd_loss(ours, theirs, temperature=self.temperature),
            "ce_teacher": cross_entropy(theirs, batch.labels),
            "kd_teacher": kd_loss(theirs, ours, temperature=self.temperature),
        }


class _Correct:
    """Forward hook that passes the output of a stage through its module."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, stage: nn.Module, args: Any, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise ACKDError(
                f"stage {self.name!r} of the teacher returns a {type(value).__name__} and method OKD corrects tensors; "
                "name other stages in teacher.taps, or choose another teacher"
            )
        corrected: Tensor = self.module(value)
        return corrected
