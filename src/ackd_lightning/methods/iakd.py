r"""IAKD. Fu, Li, Xu, Cheng, Liu, Yang: Interactive Knowledge Distillation for Image Classification, 2020.

Blocks of the student are replaced by the corresponding blocks of the frozen teacher at random, and the hybrid network
learns from the labels (arXiv:2007.01476). For stage n of the student, stage m of the teacher and a random bit b:

\(H_n = b\,A_n' T_m(A_n H_{n-1}) + (1 - b)\,S_n(H_{n-1}),\quad P(b = 1) = p_e\)

\(L = w_{ce}\,\mathrm{CE}(z^s, y) + w_{hybrid}\,\mathrm{CE}(z^H, y)\)

Gradients flow through the teacher's stages into the student's earlier ones; the teacher's weights stay. A is a 1x1
convolution where the channels of student and teacher differ, and nothing where they are equal.

The full text was not available to us. The abstract says this much: blocks of the student are replaced by the teacher's
at random. Ours:

* the loss: cross-entropies with the labels alone, by default that of the hybrid network alone (``weight_ce`` is 0)
* whole stages as blocks, so that any two convolutional networks can be paired whose stages shrink their maps alike, and
  the convolutions A
* a bit for each image rather than for a batch, because all random numbers here depend on (seed, epoch, index)
* the probability: 0.5 in the first epoch and falling linearly towards 0, so that the student works alone in the end, or
  ``uniform``
* running statistics of BatchNorm, which evaluation and export use, from the student alone
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import FitInfo, Method, Networks
from ackd_lightning.methods.pairing import pair_stages
from ackd_lightning.methods.running import only_teacher
from ackd_lightning.models.features import StagePlan, require_stages
from ackd_lightning.models.finding import require_plan
from ackd_lightning.models.freezing import statistics_kept
from ackd_lightning.models.outputs import logits_of
from ackd_lightning.models.single_stage import SingleStage
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.suffix import Cuts
from ackd_lightning.random import image_keys, stateless_uniform
from ackd_lightning.types import Batch, NetOutput, NetSpec
from ackd_lightning.validation import Fraction, NonNegative

_STREAM = 0x49414B44  # keeps these bits apart from all other random numbers


def swappable(student: NetSpec, teacher: NetSpec) -> tuple[tuple[int, int], ...]:
    """Return the pairs of stages that shrink their maps by the same factor, at most one for a stage of the student.

    Args:
        student: Shapes of the student.
        teacher: Shapes of the teacher.

    Raises:
        ACKDError: If the stages of a network are unknown, or no stage can be swapped.

    Examples:
        >>> student = NetSpec(10, ((8, 32, 32), (8, 32, 32), (16, 16, 16), (32, 8, 8)))
        >>> teacher = NetSpec(10, ((16, 32, 32), (32, 16, 16), (64, 8, 8)))
        >>> swappable(student, teacher)  # the student's first stage shrinks nothing
        ((2, 1), (3, 2))
    """
    ours = require_stages(student, "the student", "method IAKD")
    theirs = require_stages(teacher, "the teacher", "method IAKD")
    pairs = [
        (n, m)
        for n, m in pair_stages(student, teacher, method="IAKD")
        if all(ours[n - 1][axis] * theirs[m][axis] == ours[n][axis] * theirs[m - 1][axis] for axis in (1, 2))
    ]
    if not pairs:
        sizes = [" ".join("x".join(map(str, each[1:])) for each in spec) for spec in (ours, theirs)]
        raise ACKDError(
            f"no stage of the student (maps of {sizes[0]}) shrinks its map as one of the teacher ({sizes[1]}) and "
            "method IAKD swaps such stages; choose another teacher"
        )
    return tuple((n, next(m for own, m in pairs if own == n)) for n in sorted({n for n, _ in pairs}))


def _adapter(inputs: int, outputs: int) -> nn.Module:
    return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)


class IAKD(Method):
    """Cross-entropy of a student in which some stages are the teacher's, at random for every image.

    Args:
        probability: Probability p of a swap; with a falling schedule that of the first epoch.
        schedule: Course of the probability: ``falling`` linearly from p in the first epoch to p / E in the last of E
            epochs, or ``uniform``, always p.
        weight_ce: Weight of the cross-entropy of the student alone.
        weight_hybrid: Weight of the cross-entropy of the hybrid network.

    Raises:
        ACKDError: If a value is not allowed.
    """

    teacher = "own"
    labels = "mixed"
    random_by_index = True

    def __init__(
        self,
        *,
        probability: Fraction = 0.5,
        schedule: Literal["falling", "uniform"] = "falling",
        weight_ce: NonNegative = 0.0,
        weight_hybrid: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.probability, self.falls = probability, schedule == "falling"
        self.loss_weights = {"ce": weight_ce, "ce_hybrid": weight_hybrid}
        self.enter, self.leave = nn.ModuleList(), nn.ModuleList()
        self.seed = self.epoch = 0
        self.epochs: int | None = None
        self.learner: BranchyStudent
        self.stages: tuple[SingleStage, ...]
        self.keep_outside("stages", ())

    # ---------------------------------------------------------------- before the fit

    def build(self, networks: Networks) -> None:
        """Find the stages that can be swapped, and create convolutions where the channels differ.

        Args:
            networks: Networks of the training.

        Raises:
            ACKDError: If no stage can be swapped, the teacher cannot be cut, or there are several teachers.
        """
        student, teacher = networks.student, only_teacher(networks.teachers, "IAKD")
        self.layers = swappable(student, teacher)
        ours = require_stages(student, "the student", "method IAKD")
        theirs = require_stages(teacher, "the teacher", "method IAKD")
        self.enter = nn.ModuleList(_adapter(ours[n - 1][0], theirs[m - 1][0]) for n, m in self.layers)
        self.leave = nn.ModuleList(_adapter(theirs[m][0], ours[n][0]) for n, m in self.layers)
        assert isinstance(networks.student_network, BranchyStudent)
        self.keep_outside("learner", networks.student_network)
        cuts = self._cuts(networks.teacher_networks[0], "the teacher", [m for _, m in self.layers])
        for _, number in self.layers:
            SingleStage(cuts, number)
        self._cuts(self.learner.backbone, "the student", [n for n, _ in self.layers])

    def _cuts(self, network: nn.Module, whose: str, stages: list[int]) -> Cuts:
        """Return the cuts of a network whose stages exchange plain maps."""
        plan: StagePlan = require_plan(network, whose, "method IAKD")
        cuts = Cuts(network, plan)
        for number in {*stages, *(each - 1 for each in stages)}:
            call = cuts.example[2].calls.get(plan.features[number])
            if call is None or not isinstance(call.value, Tensor) or call.value.shape[1:] != call.shape:
                raise ACKDError(
                    f"{plan.features[number]!r} of {whose} returns no map B x C x H x W and method IAKD swaps stages "
                    "with such maps; choose a convolutional network"
                )
        return cuts

    def begin_fit(self, fit: FitInfo) -> None:
        """Take the teacher's stages, and store seed and length of the fit.

        Args:
            fit: Information about the fit.

        Raises:
            ACKDError: If the probability falls over an unknown number of epochs.
        """
        if self.falls and fit.epochs is None:
            raise ACKDError(
                "schedule is falling in method IAKD and the length of the fit is unknown; set trainer.max_epochs, or "
                "schedule to uniform"
            )
        self.seed, self.epochs = fit.seed, fit.epochs
        teacher = only_teacher(fit.teachers, "IAKD")
        cuts = self._cuts(teacher.network, "the teacher", [m for _, m in self.layers])
        self.keep_outside("stages", tuple(SingleStage(cuts, m) for _, m in self.layers))

    def set_epoch(self, epoch: int) -> None:
        """Store the epoch, which the probability and the bits depend on.

        Args:
            epoch: Number of the epoch, from 0.
        """
        self.epoch = epoch

    @property
    def current_probability(self) -> float:
        """Probability of a swap in this epoch."""
        if not self.falls or not self.epochs:
            return self.probability
        return self.probability * max(0.0, 1 - self.epoch / self.epochs)

    # ---------------------------------------------------------------- the hybrid network

    def swaps(self, index: Tensor) -> list[Tensor]:
        """Return for every pair of stages which images take the teacher's.

        Args:
            index: Positions of the images in the training set, ``B`` int64.

        Returns:
            ``B x 1 x 1 x 1`` bool for each pair.
        """
        keys = image_keys(index)
        drawn = [stateless_uniform(_STREAM, self.seed, self.epoch, n, keys) for n, _ in self.layers]
        return [(each < self.current_probability)[:, None, None, None] for each in drawn]

    @contextlib.contextmanager
    def _swapped(self, index: Tensor) -> Iterator[None]:
        """Let the student's modules return what the hybrid network's do."""
        assert self.learner.plan is not None
        names, network = self.learner.plan.features, self.learner.backbone
        before: dict[int, Tensor] = {}  # outputs of the hybrid network's stages
        swaps = self.swaps(index)
        place = {n: pair for pair, (n, _) in enumerate(self.layers)}

        def replace(number: int, module: nn.Module, args: Any, value: Tensor) -> Tensor:
            if number in place:
                pair = place[number]
                theirs = self.leave[pair](self.stages[pair](self.enter[pair](before[number - 1])))
                value = torch.where(swaps[pair], theirs.to(value.dtype), value)
            before[number] = value
            return value

        handles = [
            network.get_submodule(name).register_forward_hook(functools.partial(replace, number))
            for number, name in enumerate(names)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def hybrid(self, batch: Batch) -> Tensor:
        """Return the logits of the hybrid network; the student's running statistics stay.

        Args:
            batch: Images and indices.

        Returns:
            ``B x K``; gradients flow into the student and the convolutions.
        """
        if not self.stages:
            raise ACKDError("method IAKD has no teacher yet; call begin_fit before the first step")
        with statistics_kept(self.learner), self._swapped(batch.index):
            return logits_of(self.learner.backbone(batch.image))

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Run the hybrid network and return the terms ``ce`` and ``ce_hybrid``.

        Args:
            student: Output of the student; no gradient flows into it when ``weight_ce`` is 0.
            teacher: Unused.
            batch: Images, targets and indices.
        """
        own = student.logits if self.loss_weights["ce"] else student.logits.detach()
        return {
            "ce": cross_entropy(own, batch.labels),
            "ce_hybrid": cross_entropy(self.hybrid(batch), batch.labels),
        }
