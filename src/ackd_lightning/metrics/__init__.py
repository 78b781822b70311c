"""Measurements of trained networks from their logits and embeddings; no training, and no files are read."""

from ackd_lightning.metrics.calibration import fit_temperature, measure_calibration, reliability
from ackd_lightning.metrics.intervals import paired_bootstrap, paired_test, wilson_interval

__all__ = [
    "fit_temperature",
    "measure_calibration",
    "paired_bootstrap",
    "paired_test",
    "reliability",
    "wilson_interval",
]
