"""Every method with an average of the weights and the strongest augmentation whose labels it can learn from."""

from __future__ import annotations

import copy

import pytest

from ackd_lightning import DigitsDataModule, DistillationModule, Recipe, TeacherConfig, create_model
from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.data import Augmentation
from ackd_lightning.methods.description import from_description
from ackd_lightning.methods.guides import GuidedMethod
from training.helpers import NORMALISED, IndexedBlobs, build, largest_difference, sgd, state, trainer

FRAGMENTS = sorted((config_folder() / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_strong_augmentation_and_an_average_of_the_weights(path):
    method = from_description(copy.deepcopy(read_config(path)["model"]["method"]))
    mixing = {"mixup": 0.8, "cutmix": 1.0} if method.labels == "mixed" else {}
    images = DigitsDataModule(
        seed=0,
        max_per_class=6,
        batch_size=16,
        augmentation=Augmentation(policy="trivialaugment", erasing=0.25, **mixing),
    )
    several = path.stem == "atsc" or isinstance(method, GuidedMethod)
    teachers = [TeacherConfig(network=create_model("resnet8", 10), gate="off") for _ in range(1 + several)]
    net = DistillationModule.from_data(
        images,
        "resnet8",
        method=method,
        teacher=teachers if len(teachers) > 1 else teachers[0],
        optimizer=sgd(1e-3),
        recipe=Recipe(ema_decay=0.9, label_smoothing=0.0 if method.labels == "hard" else 0.1),
        seed=0,
    )
    run = trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=1)
    before = state(net.student)
    run.fit(net, datamodule=images)
    trained = state(net.student)
    assert all(each.isfinite().all() for each in trained.values())
    assert largest_difference(before, trained) > 0
    assert run.callback_metrics["train/loss"].isfinite()
    assert run.callback_metrics["val/acc"].isfinite()


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("64-true", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_a_module_of_another_type(path, precision):
    method = from_description(copy.deepcopy(read_config(path)["model"]["method"]))
    net = build(method, data=NORMALISED, lr=1e-3)
    run = trainer(max_steps=2, max_epochs=-1, precision=precision, limit_val_batches=1, val_check_interval=2)
    run.fit(net, datamodule=IndexedBlobs())
    assert run.callback_metrics["train/loss"].isfinite()
    assert run.callback_metrics["val/acc"].isfinite()
