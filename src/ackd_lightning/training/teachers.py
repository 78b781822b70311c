"""The frozen teachers of a run: outside the module tree, loaded when a fit begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.config.files import packaged_names
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import Method
from ackd_lightning.models.features import probe
from ackd_lightning.models.teacher import FrozenTeacher, TeacherConfig
from ackd_lightning.models.weights import digest
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import DataInfo, NetSpec

GivenTeacher = str | nn.Module | TeacherConfig


def as_configs(
    given: GivenTeacher | Mapping[str, Any] | Sequence[GivenTeacher | Mapping[str, Any]] | None,
) -> tuple[TeacherConfig, ...]:
    """Return every given teacher as a `TeacherConfig`.

    Args:
        given: Names, networks, configurations or their plain data; one, several, or None.
    """
    if given is None:
        return ()
    every = [given] if isinstance(given, (str, nn.Module, TeacherConfig, Mapping)) else list(given)
    return tuple(
        each
        if isinstance(each, TeacherConfig)
        else TeacherConfig(**each)
        if isinstance(each, Mapping)
        else TeacherConfig(network=each)
        for each in every
    )


def chosen(configs: Sequence[TeacherConfig], method: Method) -> Sequence[TeacherConfig]:
    """Return the teachers that a method reads: none for a method without a teacher, whatever is given.

    Args:
        configs: Teachers that were given.
        method: Method to train.

    Raises:
        ACKDError: If the method needs a teacher and there is none, or there are several and it reads one.
    """
    name = type(method).__name__
    if method.teacher == "none":
        return ()
    if not configs:
        raise ACKDError(
            f"method {name} needs a teacher and `teacher` is empty; name a model and its weight file, or pass a network"
        )
    if len(configs) > 1 and method.teacher != "own":
        raise ACKDError(f"method {name} learns from one teacher and `teacher` names {len(configs)}; name one of them")
    return configs


def weight_file(config: TeacherConfig) -> str:
    """Return the path of a teacher's weight file, or say how to make it.

    Args:
        config: Teacher given by name.

    Raises:
        ACKDError: If no file is named or it does not exist.
    """
    if config.weights is None:
        raise ACKDError(f"teacher {config.network!r} has no weight file; set teacher.weights to its .safetensors file")
    if not Path(config.weights).is_file():
        name = f"{Path(config.weights).stem}.yaml"
        known = name in packaged_names()
        remedy = f"train it with `ackd fit --config {name}`" if known else "set teacher.weights to an existing file"
        raise ACKDError(f"teacher weights {config.weights} do not exist; {remedy}")
    return config.weights


class Teachers:
    """The teachers of a training module.

    A given network is copied at once; a named one stays on the meta device until `load`.

    Args:
        configs: The teachers.
        data: Classes, image size and normalisation of the data.

    Raises:
        ACKDError: If a teacher has other classes than the data.
    """

    def __init__(self, configs: Sequence[TeacherConfig], data: DataInfo) -> None:
        self.configs, self.data = tuple(configs), data
        self._device = torch.device("cpu")
        self._given = {
            number: self._adapted(each) for number, each in enumerate(configs) if not isinstance(each.network, str)
        }
        self.frozen: tuple[FrozenTeacher, ...] = ()
        if len(self._given) == len(configs):
            self.frozen = tuple(self._given.values())
        self.structures: tuple[nn.Module, ...] = tuple(
            self._given[number].network if number in self._given else self._on_meta(each)
            for number, each in enumerate(configs)
        )
        self.specs: tuple[NetSpec, ...] = tuple(self._spec(number) for number in range(len(configs)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Teachers:
        return self  # as a FrozenTeacher: an averaged copy of the student shares its teachers

    def __iter__(self) -> Iterator[FrozenTeacher]:
        return iter(self.frozen)

    def _adapted(self, config: TeacherConfig) -> FrozenTeacher:
        """Frozen teacher of a given network, told how the data are normalised."""
        network = config.network
        assert isinstance(network, nn.Module)
        if isinstance(network, FrozenTeacher) and (config.mean or config.std or config.input_size or config.bf16):
            raise ACKDError(
                "TeacherConfig gives mean, std, input_size or bf16 of a FrozenTeacher, which has its own; give them to "
                "the FrozenTeacher"
            )
        frozen = (
            network
            if isinstance(network, FrozenTeacher)
            else FrozenTeacher(
                network, mean=config.mean, std=config.std, input_size=config.input_size, bf16=config.bf16
            )
        )
        frozen.adapt_to(self.data.mean, self.data.std, self.data.input_size)
        return frozen

    def _on_meta(self, config: TeacherConfig) -> nn.Module:
        with torch.device("meta"):
            return create_model(str(config.network), self.data.num_classes, **(config.options or {}))

    def _spec(self, number: int) -> NetSpec:
        size = self._given[number].input_size if number in self._given else self.configs[number].input_size
        spec = probe(self.structures[number], size or self.data.input_size, channels=self.data.image_shape[0])
        if spec.num_classes != self.data.num_classes:
            raise ACKDError(
                f"the teacher has {spec.num_classes} classes and the data have {self.data.num_classes}; choose a "
                "teacher of the same classes"
            )
        return spec

    def load(self) -> None:
        """Load the teachers given by name. Nothing happens when all are loaded.

        Raises:
            ACKDError: If a weight file is missing or does not fit.
        """
        if len(self.frozen) == len(self.configs):
            return
        frozen = [
            self._given[number] if number in self._given else self._loaded(config)
            for number, config in enumerate(self.configs)
        ]
        self.frozen = tuple(each.to(self._device) for each in frozen)

    def _loaded(self, config: TeacherConfig) -> FrozenTeacher:
        weights, name = weight_file(config), str(config.network)
        teacher = FrozenTeacher.from_name(
            name,
            self.data.num_classes,
            weights=weights,
            options=config.options,
            mean=config.mean,
            std=config.std,
            input_size=config.input_size,
            bf16=config.bf16,
        )
        teacher.adapt_to(self.data.mean, self.data.std, self.data.input_size)
        teacher.metadata["sha256"] = digest(weights)
        return teacher

    def match_classes(self, names: Sequence[str], *, reorder: bool) -> list[str]:
        """Let every teacher return its logits in the order of the data's classes.

        Args:
            names: Names of the data's classes.
            reorder: Whether another order of the same names can be matched; a method that runs its teachers itself
                reads them as they are.

        Returns:
            Names of the teachers whose logits are reordered.

        Raises:
            ACKDError: If a teacher has other classes, or their order cannot be matched.
        """
        changed = []
        for teacher in self.frozen:
            own = teacher.class_names
            if own is None or own == tuple(names):
                continue
            label = teacher.metadata.get("model", type(teacher.network).__name__)
            compare_classes(own, names, f"teacher {label}", "the data")
            if not reorder:
                raise ACKDError(
                    f"teacher {label} has the classes of the data in another order, which this method cannot match; "
                    "train a teacher on this data"
                )
            if teacher.reorder_classes(names):
                changed.append(label)
        return changed

    def apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
        """Move the teachers as torch moves a module.

        Args:
            fn: Function of every tensor.
            recurse: Argument of torch's own method.
        """
        self._device = fn(torch.empty(0)).device
        for each in self.frozen or self._given.values():
            each._apply(fn, recurse)  # type: ignore[no-untyped-call]


def compare_classes(first: Sequence[str], second: Sequence[str], owner: str, other: str) -> None:
    """Refuse two lists of class names that are not the same set.

    Args:
        first: Names of the classes.
        second: Other names.
        owner: Whose the first are, for the message.
        other: Whose the second are.

    Raises:
        ACKDError: Naming up to three classes that differ.
    """
    missing, further = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    if missing or further:
        parts = [
            f"{label} has no {', '.join(map(repr, names[:3]))}{' and more' if len(names) > 3 else ''}"
            for label, names in ((other, missing), (owner, further))
            if names
        ]
        raise ACKDError(
            f"{owner} and {other} have different classes ({'; '.join(parts)}); use data of the same classes, or pass "
            "--model.on_class_mismatch ignore"
        )


def describe_teachers(configs: Sequence[TeacherConfig]) -> list[dict[str, Any]] | None:
    """Return teachers given by name as plain data for a checkpoint, or None when one is a network.

    Args:
        configs: The teachers.
    """
    if any(not isinstance(each.network, str) for each in configs):
        return None
    return [
        {key: list(each) if isinstance(each, tuple) else each for key, each in vars(config).items()}
        for config in configs
    ]
