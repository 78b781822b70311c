"""Factories of optimizers and schedules: from plain data, as plain data, and what torch states against them."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ackd_lightning.errors import ACKDError
from ackd_lightning.plain import is_plain


@contextlib.contextmanager
def refused_arguments(setting: str, factory: Any) -> Iterator[None]:
    """Put what torch states against the arguments of an optimizer or a schedule into one sentence.

    Args:
        setting: Name of the setting below ``model``.
        factory: Factory that is called in the context.
    """
    try:
        yield
    except ACKDError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        described = describe_factory(factory)
        if described is None:  # a function of the user's own: its error shows where
            raise
        name, reason = str(described["class_path"]).rpartition(".")[2], " ".join(str(error).split())[:200]
        raise ACKDError(f"{name} refuses its arguments ({reason.rstrip('.')}); correct model.{setting}") from error


def constant(optimizer: Optimizer) -> LRScheduler:
    """Return a schedule that leaves the learning rate as it is.

    Args:
        optimizer: Optimizer of the schedule.
    """
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def factory_of(given: Any) -> Any:
    """Return the factory of an optimizer or a schedule: as it is given, or from the plain data of a checkpoint.

    Args:
        given: A function, or ``class_path`` and ``init_args``.

    Raises:
        ACKDError: If the plain data name a class outside ``torch.optim``, ``timm.optim`` and this package.
    """
    if not isinstance(given, Mapping):
        return given
    module, _, name = str(given["class_path"]).rpartition(".")
    if module not in ("torch.optim", "torch.optim.lr_scheduler", "timm.optim", "ackd_lightning.training"):
        raise ACKDError(f"the checkpoint was trained with {given['class_path']}; pass that optimizer or schedule again")
    home = importlib.import_module(module)
    return functools.partial(getattr(home, name), **given["init_args"])


def describe_factory(factory: Any) -> dict[str, Any] | None:
    """Return a factory of optimizers or schedules as plain data, or None if it is not a class with plain arguments.

    Args:
        factory: A class, or a `functools.partial` of one.

    Examples:
        >>> describe_factory(functools.partial(torch.optim.SGD, lr=0.1))
        {'class_path': 'torch.optim.SGD', 'init_args': {'lr': 0.1}}
    """
    if isinstance(factory, Mapping):
        return dict(factory)  # as a checkpoint has it
    arguments: dict[str, Any] = {}
    found = factory
    if isinstance(factory, functools.partial):
        arguments = dict(factory.keywords)
        found = next((each for each in (factory.func, *reversed(factory.args)) if isinstance(each, type)), None)
    if not isinstance(found, type) or not all(map(is_plain, arguments.values())):
        return None
    cls: type = found
    home: Any = torch.optim.lr_scheduler if issubclass(cls, LRScheduler) else torch.optim
    for package in ("timm.optim", "ackd_lightning.training"):
        if cls.__module__.startswith(f"{package}."):
            home = importlib.import_module(package)
    public = getattr(home, cls.__name__, None) is cls
    path = f"{home.__name__}.{cls.__name__}" if public else f"{cls.__module__}.{cls.__qualname__}"
    return {"class_path": path, "init_args": arguments}
