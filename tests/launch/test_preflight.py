"""Checks before a fit."""

from __future__ import annotations

import lightning.pytorch as L
import pytest

from ackd_lightning.data import DigitsDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.preflight import check_processes


class Own(L.LightningDataModule):
    """Data of a user, whose batches are those of each process."""

    batch_size = 5


def test_processes_divide_the_batch_of_this_packages_data_alone():
    two = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    check_processes(two, None)
    check_processes(two, Own())
    check_processes(two, DigitsDataModule(batch_size=6))
    with pytest.raises(ACKDError, match="batch_size 5 is the global batch"):
        check_processes(two, DigitsDataModule(batch_size=5))
