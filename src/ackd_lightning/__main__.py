"""``python -m ackd_lightning``: the command ``ackd``."""

from ackd_lightning.cli import script

if __name__ == "__main__":
    script()
