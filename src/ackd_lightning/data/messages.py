"""Lines that tell what was found in the data, from one process."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("ackd_lightning.data")
log.setLevel(logging.WARNING)  # its own, since some libraries raise the level of the root logger


def on_first_process() -> bool:
    """Whether this process is the one that prints."""
    rank: Any = getattr(rank_zero_only, "rank", 0)  # set by Lightning
    return rank in (None, 0)


def say(sentence: str) -> None:
    """Log a line about the data on the first process.

    Args:
        sentence: What was guessed, passed over or converted.
    """
    if on_first_process():
        log.warning(sentence)
