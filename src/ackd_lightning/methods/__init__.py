"""Distillation methods: one file is one paper."""

from ackd_lightning.methods.ackd import ACKD
from ackd_lightning.methods.base import AdversarialMethod, Method
from ackd_lightning.methods.ce import CE
from ackd_lightning.methods.kd import KD

__all__ = ["ACKD", "CE", "KD", "AdversarialMethod", "Method"]
