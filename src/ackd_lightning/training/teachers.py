"""The frozen teachers of a run: outside the module tree, loaded when a fit begins, averaged where there are several."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError, first_names
from ackd_lightning.models.class_map import FEATURES_ONLY, resolve_class_map
from ackd_lightning.models.copies import clone, name_of
from ackd_lightning.models.finding import plan_for, probe, use_taps
from ackd_lightning.models.known import remembered
from ackd_lightning.models.metadata import typed_metadata
from ackd_lightning.models.preprocessing import Preprocessing, channels_of, stated_by, usable_size
from ackd_lightning.models.start import refuse_wrapper
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.models.weights import digest, load_weights
from ackd_lightning.models.zoo.pretrained import published
from ackd_lightning.training.teacher_choice import (
    classes_in_file,
    compare_classes,
    file_metadata,
    network_options,
    on_meta,
    weight_file,
)
from ackd_lightning.types import DataInfo, NetOutput, NetSpec


def _tapped(network: nn.Module, config: TeacherConfig) -> nn.Module:
    """Name the stages of a network where a configuration does so."""
    if config.taps:
        use_taps(network, config.taps, f"the teacher {name_of(network)}")
    return network


class Teachers:
    """The teachers of a training module.

    A given network is copied at once; a named one stays on the meta device until `load`. Called on images, they return
    the output of the one teacher, or the weighted mean of the logits of several.

    Args:
        configs: The teachers.
        data: Classes, image size and normalisation of the data.

    Raises:
        ACKDError: If a teacher has other classes than the data and nothing says how they belong together, or cannot
            read the data's images.
    """

    def __init__(self, configs: Sequence[TeacherConfig], data: DataInfo) -> None:
        self.configs, self.data = tuple(configs), data
        self._device = torch.device("cpu")
        self._said: set[str] = set()
        # whether the networks belong to another owner: the user, or the module that this one is a copy of
        self._borrowed = any(isinstance(each.network, FrozenTeacher) for each in configs)
        self._given = {
            number: self._adapted(each) for number, each in enumerate(configs) if not isinstance(each.network, str)
        }
        self.frozen: tuple[FrozenTeacher, ...] = ()
        if len(self._given) == len(configs) and not any(each.weights for each in configs):
            self.frozen = tuple(self._given.values())
        self.structures: tuple[nn.Module, ...] = tuple(
            self._given[number].network
            if number in self._given
            else _tapped(on_meta(str(each.network), data.num_classes, network_options(each)), each)
            for number, each in enumerate(configs)
        )
        self.specs: tuple[NetSpec, ...] = tuple(self._spec(number) for number in range(len(configs)))
        total = sum(each.ensemble_weight for each in configs)
        self.weights = [each.ensemble_weight / total for each in configs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Teachers:
        """Share the networks until the copy is moved or converted: an average of the student never needs its own."""
        twin = copy.copy(self)
        twin._given = {number: each.view() for number, each in self._given.items()}
        given = {id(each): twin._given[number] for number, each in self._given.items()}
        twin.frozen = tuple(given.get(id(each)) or each.view() for each in self.frozen)
        twin._said, twin._borrowed = set(self._said), bool(self._given or self.frozen)
        return twin

    def release(self) -> None:
        """Forget the networks, in the copy of a module that only holds an average of its weights."""
        self.frozen, self._given, self._borrowed = (), {}, False

    def __iter__(self) -> Iterator[FrozenTeacher]:
        return iter(self.frozen)

    def __call__(self, image: Tensor) -> NetOutput:
        """Return the output of the teacher, or the weighted mean of the logits of several.

        Args:
            image: Images as the student gets them, ``B x C x H x W``.
        """
        if len(self.frozen) == 1:
            output: NetOutput = self.frozen[0](image)
            return output
        logits = [weight * each(image).logits for weight, each in zip(self.weights, self.frozen, strict=True)]
        return NetOutput(torch.stack(logits).sum(dim=0))

    def key(self) -> list[dict[str, Any]]:
        """Return everything that the logits depend on, as plain data: one entry per teacher."""
        pairs = zip(self.weights, self.frozen, strict=True)
        return [{**each.key(), **({"weight": weight} if len(self.frozen) > 1 else {})} for weight, each in pairs]

    def _adapted(self, config: TeacherConfig, *, load: bool = False) -> FrozenTeacher:
        """View of a given network that knows how the data are normalised; ``load`` reads its weight file."""
        network, metadata = config.network, {}
        assert isinstance(network, nn.Module)
        refuse_wrapper(network, "teacher")
        if isinstance(network, FrozenTeacher):
            if config.preprocessing() != Preprocessing() or config.bf16 or config.weights:
                raise ACKDError(
                    "TeacherConfig gives weights, mean, std, input_size, interpolation or bf16 of a FrozenTeacher, "
                    "which has its own; give them to the FrozenTeacher"
                )
            frozen = network.with_own_stages() if config.taps else network
        else:
            if load:
                network = clone(network)
                file = weight_file(config)
                metadata = load_weights(network, file, name=f"teacher {name_of(network)}") | {"sha256": digest(file)}
            frozen = FrozenTeacher(network, metadata=metadata, copy_network=not load, **_preprocessing(config))
        return self._view(frozen, config)

    def _view(self, teacher: FrozenTeacher, config: TeacherConfig) -> FrozenTeacher:
        _tapped(teacher.network, config)
        teacher.plan = plan_for(teacher.network)
        view = teacher.for_data(self.data)
        view.features_only = config.class_map == FEATURES_ONLY
        if not view.features_only:
            view.find_softmax(self.data)
        return view

    def _early(self, config: TeacherConfig) -> Preprocessing:
        """Preprocessing of a named network, as far as it is known before its weights are read."""
        facts: dict[str, Any] = {}
        if config.pretrained:
            facts = dict(published(str(config.network)).metadata)
        elif metadata := file_metadata(config):
            with contextlib.suppress(ACKDError):  # `load` says what is wrong with the file
                facts = typed_metadata(metadata, str(config.weights))
        return config.preprocessing().filled(
            Preprocessing(facts.get("mean"), facts.get("std"), facts.get("input_size"))
        )

    def _spec(self, number: int) -> NetSpec:
        structure, config, data = self.structures[number], self.configs[number], self.data
        if number in self._given:
            teacher = self._given[number]
            own, label, named = teacher.given, teacher.name, teacher.class_names is not None
        else:
            own, label, named = self._early(config), str(config.network), True  # `load` counts the classes of a file
        channels = channels_of(structure, own, data.image_shape[0])
        stated = stated_by(structure).input_size

        def found() -> NetSpec:
            size = usable_size(
                structure, data, given=own.input_size, stated=stated, channels=channels, name=f"teacher {label}"
            )
            return probe(structure, size, channels=channels)

        sizes = (data.input_size, own.input_size, stated, channels)
        spec = remembered(structure, ("spec", config.taps, *sizes), found)
        if spec.num_classes != data.num_classes and config.class_map is None and not named:
            raise _other_classes(label, spec.num_classes, data.num_classes)
        return replace(spec, num_classes=data.num_classes)

    def load(self) -> None:
        """Load the teachers given by name or with a weight file. Nothing happens when all are loaded.

        Raises:
            ACKDError: If a weight file is missing or does not fit, or published weights cannot be fetched.
        """
        if len(self.frozen) == len(self.configs):
            return
        frozen = []
        for number, config in enumerate(self.configs):
            if number in self._given and config.weights:
                self._given[number] = self._adapted(config, load=True)
            frozen.append(self._given[number] if number in self._given else self._loaded(config))
        self.frozen = tuple(each.to(self._device) for each in frozen)

    def _loaded(self, config: TeacherConfig) -> FrozenTeacher:
        name = str(config.network)
        if config.pretrained:
            teacher = FrozenTeacher.from_published(name, options=config.options, **_preprocessing(config))
        else:
            weights = weight_file(config)
            count = classes_in_file(name, weights, network_options(config), self.data.num_classes)
            teacher = FrozenTeacher.from_name(
                name, count, weights=weights, options=config.options, **_preprocessing(config)
            )
            teacher.metadata.setdefault("model", name)
        return self._view(teacher, config)

    # ---------------------------------------------------------------- classes

    def match_classes(self, names: Sequence[str] | None, *, reorder: bool, by_name: bool = True) -> None:
        """Let every teacher return its logits for the data's classes, in their order.

        Args:
            names: Names of the data's classes; None when unknown.
            reorder: Whether the logits can be changed; some methods read the teacher's own classes.
            by_name: Whether classes that both sides name are matched by their names; if not, by their number. A class
                map may have the names of the data's classes in either case.

        Raises:
            ACKDError: If a class map does not fit, or a teacher has other classes and nothing says how they belong
                together.
        """
        for teacher, config in zip(self.frozen, self.configs, strict=True):
            if teacher.features_only and not reorder:
                raise ACKDError(
                    f"class_map of teacher {teacher.name} is {FEATURES_ONLY} and this method uses the teacher's own "
                    "classes; choose a teacher of the data's classes"
                )
            if teacher.features_only:
                continue
            groups = self._groups(teacher, config, names, by_name=by_name)
            if groups is None:
                teacher.selection = None
                continue
            if not reorder:
                raise ACKDError(
                    f"teacher {teacher.name} has other classes than the data, or another order, which this method "
                    "cannot match; train a teacher on this data"
                )
            teacher.select_classes(groups)

    def _groups(
        self, teacher: FrozenTeacher, config: TeacherConfig, names: Sequence[str] | None, *, by_name: bool
    ) -> Sequence[Sequence[int]] | None:
        """Classes of a teacher that form each of the data's; None where they are the same in the same order."""
        count, needed = count_classes(teacher, self.data), self.data.num_classes
        theirs = teacher.classes(count)
        if config.class_map is not None and not isinstance(config.class_map, str):
            return resolve_class_map(
                config.class_map, theirs=theirs, num_classes=needed, names=names, owner=f"teacher {teacher.name}"
            )
        own = theirs.names
        if own is None or names is None or not by_name:
            if count != needed:
                raise _other_classes(teacher.name, count, needed)
            return None
        if own == tuple(names):
            return None
        places = [theirs.find(name) for name in names]
        if None in places or len(set(places)) < len(places):
            if count != needed:
                lacking = [name for name, place in zip(names, places, strict=True) if place is None]
                raise _other_classes(teacher.name, count, needed, lacking)
            compare_classes(own, names, f"teacher {teacher.name}", "the data")
        return [(place,) for place in places if place is not None]

    def announce(self) -> list[str]:
        """Return what is done to images and logits of each teacher, in words; nothing that was returned before."""
        sentences = []
        for teacher, config in zip(self.frozen, self.configs, strict=True):
            parts = list(teacher.conversion.notes)
            if any("unknown" in each for each in parts):
                parts.append("set teacher.mean, teacher.std and teacher.input_size if it was trained with others")
            if teacher.gives_probabilities:
                parts.append("its outputs are probabilities, whose logarithm is used as logits")
            if teacher.features_only:
                parts.append("its features are used and its classes are not")
            elif teacher.selection is not None:
                parts.append(_selection_in_words(teacher, self.data, explicit=config.class_map is not None))
            if parts:
                sentences.append(f"teacher {teacher.name}: {'; '.join(parts)}")
        if len(self.frozen) > 1 and any(
            each.ensemble_weight != self.configs[0].ensemble_weight for each in self.configs
        ):
            shares = ", ".join(f"{weight:.0%}" for weight in self.weights)
            sentences.append(f"logits of the teachers are averaged with weights {shares}")
        fresh = [each for each in sentences if each not in self._said]
        self._said.update(fresh)
        return fresh

    def apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> None:
        """Move the teachers as torch moves a module.

        Args:
            fn: Function of every tensor.
            recurse: Argument of torch's own method.
        """
        self._device = fn(torch.empty(0)).device
        own = self.frozen or tuple(self._given.values())
        changed = [each for each in own if _changes(each, fn)]
        for each in changed:
            each.fingerprint()  # of the weights that were given
        if self._borrowed and changed:
            for each in own:
                each.own_network()
            self._borrowed = False
        for each in own:
            each._apply(fn, recurse)  # type: ignore[no-untyped-call]


def _changes(teacher: FrozenTeacher, fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function of tensors changes the type or the place of any in a teacher."""
    kinds = {(each.dtype, each.device) for each in itertools.chain(teacher.parameters(), teacher.buffers())}
    moved = ((fn(torch.empty(0, dtype=dtype, device=device)), dtype, device) for dtype, device in kinds)
    return any((each.dtype, each.device) != (dtype, device) for each, dtype, device in moved)


def count_classes(teacher: FrozenTeacher, data: DataInfo) -> int:
    """Return the number of a teacher's own logits.

    Args:
        teacher: Teacher that knows the data.
        data: Size and channels of the data.
    """
    size = teacher.input_size or data.input_size
    return probe(
        teacher.network, size, channels=channels_of(teacher.network, teacher.given, data.image_shape[0])
    ).num_classes


def _preprocessing(config: TeacherConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in ("mean", "std", "input_size", "interpolation", "bf16")}


def _other_classes(name: str, count: int, needed: int, lacking: Sequence[str] = ()) -> ACKDError:
    what = f" (it has no {first_names(map(repr, lacking))})" if lacking else ""
    return ACKDError(
        f"teacher {name} has {count} classes and the data have {needed}{what}; give the teacher's classes for each of "
        "the data's in teacher.class_map, set it to features for a method that reads no logits, or choose a teacher of "
        "the same classes"
    )


def _selection_in_words(teacher: FrozenTeacher, data: DataInfo, *, explicit: bool) -> str:
    assert teacher.selection is not None
    groups = teacher.selection.groups
    used, count = sum(map(len, groups)), count_classes(teacher, data)
    if used == count == len(groups):
        return "its classes are reordered to those of the data"
    how = "by the class map" if explicit else "by their names"
    pooled = f" and pooled into {len(groups)}" if used > len(groups) else ""
    return f"{used} of its {count} classes are picked {how}{pooled}, and renormalised"
