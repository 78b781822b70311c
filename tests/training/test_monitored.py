"""A callback that monitors a metric which nothing logs is refused before the first step."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from ackd_lightning import ACKDError, Recipe
from ackd_lightning.methods import ACKD, CE, KD
from training.helpers import Blobs, build, trainer


def fit(method, *callbacks, tmp_path, **options):
    net = build(method)
    run = trainer(
        max_epochs=1, callbacks=list(callbacks), enable_checkpointing=True, default_root_dir=tmp_path, **options
    )
    run.fit(net, datamodule=Blobs())
    return run


@pytest.mark.parametrize(
    ("method", "callback", "named", "options"),
    [
        (CE(), EarlyStopping("val/accuracy"), "'val/acc'", {}),
        (KD(), ModelCheckpoint(monitor="val_loss", save_last=True), "'val/loss'", {}),
        (KD(), EarlyStopping("test/acc"), "val/acc", {}),
        (CE(), EarlyStopping("train/kd"), "train/ce", {}),
        (CE(), EarlyStopping("val/acc"), "train/loss", {"limit_val_batches": 0}),
        (CE(), ModelCheckpoint(monitor="lr/student"), "val/acc", {}),  # nothing logs it
        (CE(), EarlyStopping("epoch"), "val/acc", {}),
    ],
)
def test_an_unknown_metric(method, callback, named, options, tmp_path):
    with pytest.raises(ACKDError, match=rf"{callback.monitor}.*{named}"):
        fit(method, callback, tmp_path=tmp_path, **options)


@pytest.mark.parametrize(
    ("method", "monitor"),
    [
        *[(KD(), each) for each in ("val/acc", "val/loss", "val/acc_top5", "train/kd", "train/ce", "train/acc")],
        *[(ACKD(), each) for each in ("val/learners_cka", "val/attention_entropy", "val/aux1_acc", "train/loss")],
    ],
)
def test_a_metric_that_is_logged(method, monitor, tmp_path):
    assert fit(method, EarlyStopping(monitor), tmp_path=tmp_path).current_epoch == 1


@pytest.mark.parametrize("monitor", ["lr/student", "lr/discriminators"])
def test_a_learning_rate_that_is_logged(monitor, tmp_path):
    logged = LearningRateMonitor(logging_interval="epoch")
    run = fit(ACKD(), logged, ModelCheckpoint(monitor=monitor), tmp_path=tmp_path, logger=CSVLogger(tmp_path))
    assert monitor in run.callback_metrics


def test_an_unknown_learning_rate(tmp_path):
    with pytest.raises(ACKDError):
        fit(CE(), LearningRateMonitor(), EarlyStopping("lr/studnet"), tmp_path=tmp_path, logger=CSVLogger(tmp_path))


class Own(L.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("mine", 1.0)


def test_a_metric_of_a_callback_of_the_users_own(tmp_path):
    assert fit(CE(), Own(), EarlyStopping("mine"), tmp_path=tmp_path).current_epoch == 1


def test_a_metric_that_need_not_be_there(tmp_path):
    assert fit(CE(), EarlyStopping("mine", strict=False), tmp_path=tmp_path).current_epoch == 1


def test_early_stopping_of_the_recipe(tmp_path):
    net = build(CE())
    net.recipe = Recipe(early_stopping=1)
    trainer(max_epochs=1).fit(net, datamodule=Blobs())
