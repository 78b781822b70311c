"""Constructor arguments of data modules, which pass those of their base classes on with ``**options``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import lightning as L

from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.plain import as_plain, is_plain


def full_signature(cls: type) -> inspect.Signature:
    """Return the signature of a constructor, with the arguments of the base classes in place of ``**options``.

    Args:
        cls: Class whose constructors each pass ``**options`` to the next one, or take none.
    """
    found: dict[str, inspect.Parameter] = {}
    for each in cls.__mro__:
        if "__init__" not in vars(each):
            continue
        parameters = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                found.setdefault(parameter.name, parameter)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return inspect.Signature(sorted(found.values(), key=lambda parameter: parameter.kind))


def plain_arguments(cls: type, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, defaults included, as far as they are plain data; paths become text.

    Args:
        cls: Class that is called.
        args: Positional arguments.
        options: Keyword arguments.

    Raises:
        ACKDError: If the constructor does not have one of the arguments.
    """
    signature = full_signature(cls)
    for name in options:
        if name not in signature.parameters:
            raise ACKDError(f"{cls.__name__} has no argument {name!r}; {near_matches(name, signature.parameters)}")
    try:
        bound = signature.bind_partial(*args, **options)
    except TypeError as error:
        raise ACKDError(f"{cls.__name__} cannot be created: {error}; name its arguments") from None
    bound.apply_defaults()
    values = {
        name: str(value)
        if isinstance(value, Path)
        else asdict(value)
        if is_dataclass(value) and not isinstance(value, type)
        else value
        for name, value in bound.arguments.items()
    }
    return {name: plain for name, value in values.items() if is_plain(plain := as_plain(value))}


class PlainArguments(L.LightningDataModule):
    """A data module whose hyperparameters are its arguments, plain data only, so that checkpoints load safely.

    A constructor of a subclass names the arguments that it uses or changes, and passes the others to its base class as
    ``**options``. `inspect.signature` and the command line show all of them; an unknown one is refused.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.__signature__ = full_signature(cls)  # type: ignore[attr-defined]  # read by inspect

    def __new__(cls, *args: Any, **options: Any) -> PlainArguments:
        """Refuse unknown arguments and keep the others as hyperparameters."""
        module = super().__new__(cls)
        module.save_hyperparameters(plain_arguments(cls, args, options), logger=False)
        return module
