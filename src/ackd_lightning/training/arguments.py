"""Arguments of the constructor of a training module, which a checkpoint keeps."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import lightning.pytorch as L


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
        own(self, *args, **kwargs)

    cls.__init__ = constructor  # type: ignore[method-assign]
