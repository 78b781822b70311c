"""The frozen teachers of a run: outside the module tree, loaded when a fit begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.callbacks.health import check_teacher
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import probe
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.weights import digest
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import NetSpec

GivenTeacher = str | nn.Module


class Teachers:
    """One teacher or several, each a name with a weight file or a network.

    A given network is taken over at once; a named one is on the meta device until ``load``.

    Args:
        given: names, networks or ``FrozenTeacher``s.
        weights: weight files of the named ones, in their order; a single one for a single teacher.
        options: for ``create_model``; of a single teacher only.
        num_classes: K.
        bf16: run them in bfloat16.
        data: how images come: mean, std (None when unknown) and side in pixels.

    Raises:
        ACKDError: for a teacher of other classes, and for lists that do not fit each other.
    """

    def __init__(
        self,
        given: Sequence[GivenTeacher],
        *,
        weights: Sequence[str] | str | None,
        options: Mapping[str, Any],
        num_classes: int,
        bf16: bool,
        data: tuple[Sequence[float] | None, Sequence[float] | None, int],
    ) -> None:
        named = [each for each in given if isinstance(each, str)]
        if options and len(given) > 1:
            raise ACKDError(
                f"teacher_options are for one teacher and `teacher` names {len(given)}; name networks that need none"
            )
        files = [weights] if isinstance(weights, str) else list(weights or ())
        if len(files) != len(named) and len(named) > 1:
            raise ACKDError(
                f"`teacher` names {len(named)} networks and teacher_weights {len(files)} files; name one file each, "
                "in the same order"
            )
        self.num_classes, self.bf16, self.data, self.options = num_classes, bf16, data, dict(options)
        self.given = tuple(given)
        self.files = dict(enumerate(files))
        self.frozen: tuple[FrozenTeacher, ...] = ()
        self._device = torch.device("cpu")
        own = [self._take_over(each) for each in given if not isinstance(each, str)]
        self._networks = own
        if not named:
            self.frozen = tuple(own)
        structures = iter(own)
        self.structures: tuple[nn.Module, ...] = tuple(
            self._on_meta(each) if isinstance(each, str) else next(structures).network for each in given
        )
        self.specs: tuple[NetSpec, ...] = tuple(self._spec(number) for number in range(len(given)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Teachers:
        return self  # as a FrozenTeacher: an EMA copy of the student shares its teachers

    def _take_over(self, network: nn.Module) -> FrozenTeacher:
        frozen = network if isinstance(network, FrozenTeacher) else FrozenTeacher(network, bf16=self.bf16)
        frozen.adapt_to(*self.data)
        return frozen

    def _on_meta(self, name: str) -> nn.Module:
        with torch.device("meta"):
            return create_model(name, self.num_classes, **self.options)

    def _spec(self, number: int) -> NetSpec:
        given = self.given[number]
        size = self.data[2]
        if not isinstance(given, str):
            place = sum(not isinstance(each, str) for each in self.given[:number])
            size = self._networks[place].input_size or size
        spec = probe(self.structures[number], size)
        if spec.num_classes != self.num_classes:
            raise ACKDError(
                f"the teacher has {spec.num_classes} classes and num_classes is {self.num_classes}; "
                "choose a teacher of the same classes"
            )
        return spec

    def load(self) -> None:
        """Load what was given by name; nothing to do when all are there.

        Raises:
            ACKDError: when a weight file is missing or does not fit.
        """
        if len(self.frozen) == len(self.given):
            return
        frozen, own, named = [], iter(self._networks), 0
        for given in self.given:
            if not isinstance(given, str):
                frozen.append(next(own))
                continue
            weights = check_teacher(given, self.files.get(named))
            named += 1
            teacher = FrozenTeacher.from_name(
                given, self.num_classes, weights=weights, options=self.options, bf16=self.bf16
            )
            teacher.adapt_to(*self.data)
            teacher.metadata["sha256"] = digest(weights)
            frozen.append(teacher)
        self.frozen = tuple(each.to(self._device) for each in frozen)

    def apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
        """Move the teachers as torch moves a module.

        Args:
            fn: what is done to every tensor.
            recurse: as torch's own.
        """
        self._device = fn(torch.empty(0)).device
        for each in self.frozen or self._networks:
            each._apply(fn, recurse)  # type: ignore[no-untyped-call]
