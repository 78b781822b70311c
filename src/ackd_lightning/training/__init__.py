"""The training module and what it consists of; no command line, no run folders."""

from ackd_lightning.training.dot import DOT
from ackd_lightning.training.module import ACKDModule, DistillationModule
from ackd_lightning.training.schedule import Recipe

__all__ = ["DOT", "ACKDModule", "DistillationModule", "Recipe"]
