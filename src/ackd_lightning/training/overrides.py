"""Hooks that a sub-class of a training module overrides, and a training module inside another module."""

from __future__ import annotations

import inspect
from types import CodeType

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from ackd_lightning.errors import ACKDError

_OTHERS = ("setup", "configure_callbacks")
"""Hooks whose names do not begin with ``on_``."""


def check_overrides(cls: type[L.LightningModule], base: type[L.LightningModule]) -> None:
    """Refuse hooks that leave out what a training module does in them, such as updating memories.

    Args:
        cls: Class of a module.
        base: The training module that it is derived from.

    Raises:
        ACKDError: If a hook does not call the hook of that name of a base class.
    """
    package = __name__.partition(".")[0]
    ours = [each for each in base.__mro__ if each.__module__.partition(".")[0] == package]
    hooks = {name for each in ours for name in vars(each) if name.startswith("on_") or name in _OTHERS}
    for each in cls.__mro__[: cls.__mro__.index(base)]:
        for name in sorted(hooks & vars(each).keys()):
            code = getattr(inspect.unwrap(vars(each)[name]), "__code__", None)
            if code is not None and name not in _names(code):
                raise ACKDError(
                    f"{each.__qualname__}.{name} replaces what {base.__name__} does there; call super().{name}(...)"
                )


_AUTOMATIC = ("optimizer_step", "optimizer_zero_grad", "on_before_zero_grad", "configure_gradient_clipping")
"""Hooks that Lightning calls in automatic optimization alone."""


def say_uncalled(module: L.LightningModule, base: type[L.LightningModule]) -> None:
    """Say which hooks of a sub-class nothing calls, and refuse a step of its own: its method has its own optimizers.

    Args:
        module: A training module with manual optimization.
        base: The training module that it is derived from.

    Raises:
        ACKDError: If the step of this package is replaced.
    """
    derived = type(module).__mro__[: type(module).__mro__.index(base)]
    for each in derived:
        code = getattr(inspect.unwrap(vars(each).get("training_step", each)), "__code__", None)
        if code is not None and "training_step" not in _names(code):
            raise ACKDError(
                f"{each.__qualname__}.training_step returns a loss that nothing reads, since its method steps its own "
                "optimizers (manual optimization); write the term as a Method and add it with Sum, or call "
                "super().training_step(...)"
            )
    if found := [name for name in _AUTOMATIC if any(name in vars(each) for each in derived)]:
        rank_zero_warn(
            f"{type(module).__name__} overrides {', '.join(found)}, which Lightning does not call where a method has "
            "optimizers of its own (manual optimization); use on_before_optimizer_step, or recipe.gradient_clip_val"
        )


def _names(code: CodeType) -> set[str]:
    """Names that a function uses, inner functions included."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return {*code.co_names, *(name for names in inner for name in names)}


def check_outermost(module: L.LightningModule) -> None:
    """Refuse a training module inside another one, whose hooks are all that the Trainer calls.

    Args:
        module: A training module.

    Raises:
        ACKDError: Naming the module around it.
    """
    trainer = module._trainer
    around = None if trainer is None else trainer.lightning_module
    if around is not None and around is not module:
        inner, outer = type(module).__name__, type(around).__name__
        raise ACKDError(
            f"{inner} is inside {outer}, and Lightning calls the hooks of {outer} alone; derive {outer} from {inner}"
        )
