"""Strategies of Lightning that a training module cannot run with."""

from __future__ import annotations

from typing import Any

from ackd_lightning.errors import ACKDError

_SHARDING = ("fsdp", "deepspeed", "modelparallel")


def refuse_sharding(strategy: Any) -> None:
    """Refuse a strategy that divides the weights of the student among processes.

    A student that fits no single GPU is not what this package exists for: teacher and student are run whole, and
    exports and checkpoints hold whole networks.

    Args:
        strategy: Lightning's name of a strategy, class path, or strategy.

    Raises:
        ACKDError: Naming the strategy.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name.rpartition(".")[2].lower().replace("_", "").removeprefix("xla").startswith(_SHARDING):
        raise ACKDError(
            f"trainer.strategy is {name}, which divides the weights among processes, and distillation runs student and "
            "teacher whole; use ddp"
        )
