"""Lines that tell what was found in the data, from one process."""

from __future__ import annotations

import logging

from lightning.pytorch.utilities import rank_zero_only

log = logging.getLogger("ackd_lightning.data")
log.setLevel(logging.WARNING)  # its own, since some libraries raise the level of the root logger


@rank_zero_only
def say(sentence: str) -> None:
    """Log a line about the data on the first process.

    Args:
        sentence: What was guessed, passed over or converted.
    """
    log.warning(sentence)
