"""Arguments of the constructor of a training module: which a checkpoint keeps, and a method that is free."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import lightning.pytorch as L
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import Method, Networks
from ackd_lightning.training.schedule import Recipe
from ackd_lightning.types import DataInfo


def note_arguments(cls: type[L.LightningModule]) -> None:
    """Let a class note the names of the arguments that its constructor is given, in ``_given``.

    Args:
        cls: Class of a module; unchanged without a constructor of its own.
    """
    own = cls.__dict__.get("__init__")
    if own is None:
        return
    parameters = list(inspect.signature(own).parameters.values())[1:]
    names = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]

    @functools.wraps(own)
    def constructor(self: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        given = {*kwargs, *names[: len(args)], *(["student"] if len(args) > len(names) else [])}
        self.__dict__.setdefault("_given", given)  # the outermost constructor comes first
        own(self, *args, **{name: _as_saved(name, each) for name, each in kwargs.items()})

    cls.__init__ = constructor  # type: ignore[method-assign]


def _as_saved(name: str, value: Any) -> Any:
    """Return `DataInfo` or `Recipe` of plain data, in which a checkpoint keeps the arguments of a sub-class."""
    kind = {"data": DataInfo, "recipe": Recipe}.get(name)
    if kind is None or not isinstance(value, Mapping) or {each.name for each in fields(kind)} != value.keys():
        return value
    return kind(**value)


def build_method(method: Method, networks: Networks) -> None:
    """Build a method for the networks of a module.

    A method without tensors of its own, such as `KD`, may be given to several modules.

    Args:
        method: Method of the module.
        networks: Shapes and structures of student and teachers.

    Raises:
        ACKDError: If it was built for another module, which it would change.
    """
    parts = [each for each in method.modules() if isinstance(each, Method)]
    for each in parts:
        if "_was_built" in vars(each) and (
            next(each.parameters(), None) is not None or any(True for _ in each.buffers())
        ):
            name = type(each).__name__
            raise ACKDError(
                f"this {name} belongs to another module, whose parameters and memories it holds; make a {name} for "
                "each module"
            )
    method.build(networks)
    _refuse_student(method, networks.student_network)
    for each in parts:
        vars(each)["_was_built"] = True


def _refuse_student(method: Method, student: nn.Module | None) -> None:
    """Refuse a method that holds the student, or a part of it, as a sub-module: optimizers would have it twice."""
    own = {id(each) for each in (() if student is None else student.parameters())}
    if not own & {id(each) for each in method.parameters()}:
        return
    if not own & {id(each) for group in method.parameter_groups() for each in group["params"]}:
        return  # a method may leave them out itself
    parts = [each for each in method.modules() if isinstance(each, Method)]
    owner, name = next(
        (type(each).__name__, name)
        for each in reversed(parts)  # those of a sum before the sum
        for name, part in (*each.named_parameters(recurse=False), *each.named_children())
        if own & {id(one) for one in (part.parameters() if isinstance(part, nn.Module) else [part])}
    )
    raise ACKDError(
        f"method {owner} holds the student's parameters in {name!r}; set that attribute with "
        f"self.keep_outside({name!r}, ...), which leaves them to the student"
    )


def refuse_late_parameters(method: Method, known: Collection[int]) -> None:
    """Refuse parameters that a method has created in a step, which no optimizer has.

    Args:
        method: Method of the module.
        known: Identities of its parameters before the first step; names change, as when weights are pruned.

    Raises:
        ACKDError: Naming the first of them.
    """
    late = [name for name, each in method.named_parameters() if each.requires_grad and id(each) not in known]
    if late:
        raise ACKDError(
            f"method {type(method).__name__} has created {late[0]} in a step, where no optimizer has it; create it in "
            "`build`, with the shapes in `networks`"
        )
