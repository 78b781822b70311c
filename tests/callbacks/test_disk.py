"""A disk that is too small for the checkpoints of a run is reported at the start."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ackd_lightning import ACKD
from ackd_lightning.callbacks.disk import DiskSpaceCheck, checkpoint_bytes
from training.helpers import Blobs, module, trainer

Usage = namedtuple("Usage", "total used free")


def savers(folder, **options):
    return [ModelCheckpoint(folder / "checkpoints", save_on_train_epoch_end=True, **options)]


def fit(folder, monkeypatch, free, *, epochs=1, **options):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, free))
    callbacks = [*savers(folder, **options), DiskSpaceCheck(folder)]
    run = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks, limit_val_batches=0)
    run.fit(module(), datamodule=Blobs())


@pytest.mark.parametrize("discriminator", ["adam", "sgd"])
def test_the_estimate_is_near_the_file(tmp_path, discriminator):
    net = module(ACKD(discriminator_optimizer=discriminator))
    run = trainer(max_epochs=1, enable_checkpointing=True, callbacks=savers(tmp_path, filename="last"))
    run.fit(net, datamodule=Blobs())
    file = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    remembered = [
        value for each in file["optimizer_states"] for entry in each["state"].values() for value in entry.values()
    ]
    tensors = [value for value in (*file["state_dict"].values(), *remembered) if torch.is_tensor(value) and value.dim()]
    exact = sum(each.numel() * each.element_size() for each in tensors)
    assert checkpoint_bytes(net, run.optimizers) == pytest.approx(exact, rel=0.02)


def test_a_small_disk_is_reported_before_the_first_step(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="for 1 checkpoints .* the disk has 0 MB left"):
        fit(tmp_path, monkeypatch, free=1000)


def test_a_disk_with_enough_space_is_not_mentioned(tmp_path, monkeypatch):
    fit(tmp_path, monkeypatch, free=10**9)  # a warning would be an error here


def test_every_checkpoint_that_is_kept_counts(tmp_path, monkeypatch):
    """200 epochs, each kept: space for a few is not enough."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 10**6))
    (saver,) = savers(tmp_path, save_top_k=-1)
    run = trainer(max_epochs=200, enable_checkpointing=True, callbacks=[saver, DiskSpaceCheck(tmp_path)], max_steps=1)
    with pytest.warns(UserWarning, match="for 200 checkpoints"):
        run.fit(module(), datamodule=Blobs())


def test_nothing_is_checked_under_fast_dev_run(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: pytest.fail("looked at the disk"))
    trainer(fast_dev_run=1, callbacks=[DiskSpaceCheck(tmp_path)]).fit(module(), datamodule=Blobs())
