"""Lightning modules and callbacks."""

from ackd_lightning.training.adversarial import ACKDModule, AdversarialModule
from ackd_lightning.training.distillation import DistillationModule

__all__ = ["ACKDModule", "AdversarialModule", "DistillationModule"]
