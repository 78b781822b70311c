"""Names of settings: all that there are, and the nearest ones to a name that does not exist."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass

from lightning.pytorch import LightningDataModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ackd_lightning.config.class_paths import declared, sub_classes
from ackd_lightning.methods.base import Method

_GIVEN = {"params", "optimizer"}
"""Arguments of optimizers and schedules that are not settings."""
_KINDS: dict[str, type] = {
    "data": LightningDataModule,
    "model.method": Method,
    "model.optimizer": Optimizer,
    "model.lr_scheduler": LRScheduler,
}
_ROOMS = (
    "ackd_lightning.data",
    "ackd_lightning.methods",
    "ackd_lightning.training",
    "torch.optim",
    "torch.optim.lr_scheduler",
)
_USUAL = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epochs": "max_epochs",
    "seed": "seed_everything",
    "gpus": "devices",
    "workers": "num_workers",
    "tau": "temperature",
    "arch": "network",
    "name": "network",
    "path": "weights",
    "checkpoint": "weights",
    "ckpt": "weights",
    "amp": "precision",
}
"""Usual names of settings elsewhere, and ours."""
_SHOWN = 3


def names_below(classes: Mapping[str, type]) -> set[str]:
    """Return the dotted names of the arguments of classes, and of the dataclasses that they take.

    Args:
        classes: Class by the place of its setting.
    """
    return {name for place, cls in classes.items() for name in _arguments(cls, place)}


def _arguments(cls: type, place: str) -> Iterator[str]:
    given = _GIVEN if issubclass(cls, Optimizer | LRScheduler) else set()
    for name, parameter in inspect.signature(cls).parameters.items():
        stands_for_others = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if name in given or stands_for_others or (place == "model" and name == "data"):
            continue
        yield f"{place}.{name}"
        for inner in declared(cls, name):
            if is_dataclass(inner):
                yield from _arguments(inner, f"{place}.{name}")


def nearest(full: str, names: Iterable[str]) -> list[str]:
    """Return up to three settings that may be meant by a name that does not exist.

    The same last part anywhere comes first, then a similar one beside it, then a similar one anywhere.

    Args:
        full: Dotted name, or the last parts of one.
        names: Dotted names of all settings.

    Examples:
        >>> nearest("lr", ["model.optimizer.lr", "trainer.max_epochs"])
        ['model.optimizer.lr']
        >>> nearest("trainer.max_epoch", ["model.optimizer.lr", "trainer.max_epochs", "trainer.devices"])
        ['trainer.max_epochs']
    """
    known = sorted(set(names))
    parent, _, last = full.rpartition(".")
    plain = _plain(last)
    if same := [each for each in known if _plain(each.rpartition(".")[2]) in _meanings(last)]:
        return sorted(same, key=lambda each: -_likeness(each, full))[:_SHOWN]
    beside = [each for each in known if each.rpartition(".")[0] == parent] if parent else known
    return _similar(plain, beside) or _similar(plain, known)


def is_meant(name: str, full: str) -> bool:
    """Return whether two names have the same last part, or parts that usually mean the same.

    Args:
        name: Dotted name of a setting.
        full: Dotted name that was given.
    """
    return _plain(name.rpartition(".")[2]) in _meanings(full.rpartition(".")[2])


def _meanings(last: str) -> tuple[str, ...]:
    plain = _plain(last)
    return tuple(dict.fromkeys((plain, _USUAL.get(plain, plain))))


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(a=one, b=other).ratio()


def _similar(last: str, names: Iterable[str]) -> list[str]:
    """Names whose last part is similar to a word, or contains it as one of its words."""
    scores = {name: _likeness(_plain(name.rpartition(".")[2]), last) for name in names}
    best = max(scores.values(), default=0.0)
    near = [name for name, score in scores.items() if score >= max(0.6, best - 0.15)]
    near = near or [name for name in scores if last in _plain(name.rpartition(".")[2]).split("_")]
    return sorted(near, key=lambda name: -scores[name])[:_SHOWN]


def of_other_classes(full: str, classes: Mapping[str, type]) -> str:
    """Say which other classes have a setting that the chosen one does not have; empty if none has.

    Args:
        full: Dotted name, or the last parts of one.
        classes: Chosen class by the place of its setting.
    """
    rooms = map(importlib.import_module, _ROOMS)
    public = {each for room in rooms for each in vars(room).values() if isinstance(each, type)}
    inside = [place for place in _KINDS if full.startswith(f"{place}.")]
    section = full.partition(".")[0] if "." in full else ""
    places = inside or [place for place in _KINDS if place.startswith(section)] or list(_KINDS)
    for wanted in _meanings(full.rpartition(".")[2]):
        for place in places:
            owners = sorted(
                {each.__name__ for each in sub_classes(_KINDS[place]) if each in public and wanted in _own(each, place)}
            )
            if owners:
                shown = ", ".join(owners[:4]) + (", …" if len(owners) > 4 else "")
                chosen = f" and {place} is {classes[place].__name__}" if place in classes else ""
                return f"{place}.{wanted} belongs to {shown}{chosen}"
    return ""


def _own(cls: type, place: str) -> set[str]:
    return {name.removeprefix(f"{place}.") for name in _arguments(cls, place)}
