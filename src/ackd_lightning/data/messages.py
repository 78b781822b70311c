"""Lines that tell what was found in the data, from one process."""

from __future__ import annotations

import logging

from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("ackd_lightning.data")
log.setLevel(logging.WARNING)  # its own, since some libraries raise the level of the root logger


def on_first_process() -> bool:
    """Whether this process is the one that prints and writes, also when torchrun or SLURM started it."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)  # set by Lightning; its type does not have it


@rank_zero_only
def say(sentence: str) -> None:
    """Log a line about the data on the first process.

    Args:
        sentence: What was guessed, passed over or converted.
    """
    log.warning(sentence)
