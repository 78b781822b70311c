"""``ackd reproduce``: plan the runs of a paper's table, start them, write the table; no run is carried out in here."""

from ackd_lightning.commands.reproduce.command import reproduce

__all__ = ["reproduce"]
