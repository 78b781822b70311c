"""A weighted sum of methods, trained as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import LABELS, FitInfo, Method, Networks, TeacherAccess
from ackd_lightning.types import Batch, NetOutput
from ackd_lightning.validation import NonNegative

T = TypeVar("T")
_ACCESS: tuple[TeacherAccess, ...] = ("none", "logits", "output")


class Sum(Method):
    """Several methods on the same student and teacher; the loss is the weighted sum of their losses.

    Terms keep their names; where two methods have a term of the same name, that of the n-th method gets the suffix
    ``_n``. At most one of the methods may grow auxiliary learners, and none may run its teachers itself or replace the
    student's classifier.

    Args:
        methods: The methods, at least one.
        weights: Weight of every method's loss; all 1 by default.

    Raises:
        ACKDError: If the methods do not go together.

    Examples:
        >>> from ackd_lightning.methods import CRD, KD
        >>> Sum([KD(), CRD()], weights=[1.0, 0.5]).loss_weights
        {'ce': 0.1, 'kd': 0.9, 'ce_2': 0.5, 'kd_2': 0.0, 'crd': 0.4}
    """

    def __init__(self, methods: Sequence[Method], *, weights: Sequence[NonNegative] | None = None) -> None:
        super().__init__()
        if any(not isinstance(each, Method) for each in methods):
            raise ACKDError(f"methods is {list(methods)!r} in Sum; give instances of methods, such as [KD(), CRD()]")
        if not methods:
            raise ACKDError("methods is empty in Sum; give at least one, such as [KD(), CRD()]")
        if weights is not None and len(weights) != len(methods):
            raise ACKDError(f"Sum has {len(methods)} methods and {len(weights)} weights; give one weight each")
        if len({id(each) for each in methods}) < len(methods):
            raise ACKDError("a method stands twice in Sum; pass two instances")
        running = [type(each).__name__ for each in methods if each.teacher == "own"]
        if running:
            raise ACKDError(f"method {running[0]} runs its teachers itself and cannot be part of a sum")
        grown = [type(each).__name__ for each in methods if each.branches is None or len(each.branches)]
        if len(grown) > 1:
            raise ACKDError(f"methods {' and '.join(grown)} both grow auxiliary learners; sum at most one of them")
        self.methods = nn.ModuleList(methods)
        self.scales = tuple(weights or (1.0,) * len(methods))
        self.teacher = _ACCESS[max(_ACCESS.index(each.teacher) for each in methods)]
        self.labels = LABELS[min(LABELS.index(each.labels) for each in methods)]
        self.branches = next((each.branches for each in methods if each.branches is None or each.branches), ())
        if shown := [each for each in methods if hasattr(each, "examples")]:
            self.examples = shown[0].examples  # pictures of what one of the methods generates
        self._terms: dict[tuple[int, str], str] = {}
        self._owners: dict[str, tuple[int, str]] = {}
        self._collect()

    def _each(self) -> list[Method]:
        return [cast(Method, each) for each in self.methods]

    def _term(self, number: int, name: str) -> str:
        """Name in the sum of a term or a logged value of the method at a position from 0."""
        if (number, name) not in self._terms:
            taken, free, suffix = set(self._terms.values()), name, number + 1
            while free in taken:
                free, suffix = f"{name}_{suffix}", suffix + 1
            self._terms[number, name] = free
        return self._terms[number, name]

    def _collect(self) -> None:
        """Take over what the methods have set."""
        self.loss_weights = {
            self._term(number, name): scale * weight
            for number, (method, scale) in enumerate(zip(self._each(), self.scales, strict=True))
            for name, weight in method.loss_weights.items()
        }
        self.whole_batches = any(method.whole_batches for method in self._each())
        self.reads_index = any(method.reads_index for method in self._each())
        self.raw_classes = any(method.raw_classes for method in self._each())
        self.random_by_index = any(method.random_by_index for method in self._each())
        self.layers = tuple(dict.fromkeys(pair for method in self._each() for pair in method.layers))
        self.lr_scales = self._prefixed_mapping(lambda method: method.lr_scales)
        self.compile_modules = tuple(self._prefixed_mapping(lambda method: dict.fromkeys(method.compile_modules, 1.0)))
        buffers = self._prefixed_mapping(lambda method: dict.fromkeys(method.replicated_buffers, 1.0))
        self.replicated_buffers = tuple(buffers)

    def _prefixed_mapping(self, of: Callable[[Method], Mapping[str, float]]) -> dict[str, float]:
        return {f"methods.{n}.{name}": v for n, method in enumerate(self._each()) for name, v in of(method).items()}

    def build(self, networks: Networks) -> None:
        """Build every method.

        Args:
            networks: Shapes and structures of student and teachers.
        """
        for method in self._each():
            method.build(networks)
            if method.head is not None:
                raise ACKDError(
                    f"method {type(method).__name__} replaces the student's classifier and cannot be part of a sum; "
                    "write one method with all terms"
                )
        self._collect()

    def begin_fit(self, fit: FitInfo) -> None:
        """Tell every method that a fit starts.

        Args:
            fit: Information about the fit.
        """
        for method in self._each():
            method.begin_fit(fit)
        self._collect()

    def set_epoch(self, epoch: int) -> None:
        """Tell every method the epoch.

        Args:
            epoch: Number of the epoch, from 0.
        """
        for method in self._each():
            method.set_epoch(epoch)
        self._collect()

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of all methods; arguments as in the base class."""
        return {
            self._term(number, name): term
            for number, method in enumerate(self._each())
            for name, term in method(student, teacher, batch).items()
        }

    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Update the memories of every method; arguments as in the base class."""
        for method in self._each():
            method.update(student, teacher, batch)

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        """Return the auxiliary optimizers of all methods; a name that is taken gets the suffix ``_n``."""
        found: dict[str, Optimizer] = {}
        self._owners = {}
        for number, method in enumerate(self._each(), start=1):
            for own, optimizer in method.auxiliary_optimizers().items():
                name, suffix = own, number
                while name in found:
                    name, suffix = f"{own}_{suffix}", suffix + 1
                found[name], self._owners[name] = optimizer, (number - 1, own)
        return found

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return the auxiliary loss of the method that owns the optimizer; arguments as in the base class."""
        number, own = self._owners[name]
        result = self._each()[number].auxiliary_loss(own, student, teacher, batch)
        if result is None:
            return None
        loss, values = result
        return loss, {self._term(number, key): value for key, value in values.items()}

    def ensemble(self, student: NetOutput) -> Tensor | None:
        """Return the group logits of the method that has a group.

        Args:
            student: Output of the student.
        """
        groups = (method.ensemble(student) for method in self._each())
        return next((group for group in groups if group is not None), None)

    def statistics(self, student: NetOutput) -> dict[str, Any]:
        """Return the statistics of all methods.

        Args:
            student: Output of the student.
        """
        return {
            self._term(number, name): value
            for number, method in enumerate(self._each())
            for name, value in method.statistics(student).items()
        }
