"""``ackd reproduce``: the runs behind a table of the paper, carried out once, and the table."""

from ackd_lightning.commands.reproduce.command import reproduce

__all__ = ["reproduce"]
