"""Lightning modules and callbacks."""

from ackd_lightning.training.manual import ACKDModule, AdversarialModule
from ackd_lightning.training.module import DistillationModule

__all__ = ["ACKDModule", "AdversarialModule", "DistillationModule"]
