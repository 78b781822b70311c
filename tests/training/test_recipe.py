"""What a recipe adds to a fit: an average of the weights, early stopping, hints for runs that diverge."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ackd_lightning import create_model
from ackd_lightning.callbacks.averaging import EMA, _Average
from ackd_lightning.callbacks.stopping import StopEarly
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import CE, CRD, DIST, KD, RKD, SP, VID, ReviewKD
from ackd_lightning.training import Recipe
from training.helpers import CLASSES, SIZE, Blobs, IndexedBlobs, build, largest_difference, state, teaching, trainer


def fitted(recipe, *, epochs=3, lr=0.05, data=None, **options):
    net = build(CE(), lr=lr, recipe=recipe, decays=[50])
    run = trainer(max_epochs=epochs, **options)
    run.fit(net, data or Blobs())
    return net, run


def test_the_average_is_that_of_the_steps_with_a_warm_up_of_the_decay():
    class Steps(EMA):
        def __init__(self):
            super().__init__(decay=0.9)
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, *rest):
            super().on_train_batch_end(trainer, pl_module, *rest)
            self.seen.append(pl_module.student.plain().fc.weight.detach().clone())

    average = Steps()
    net = build(CE(), decays=[50])
    trainer(max_epochs=2, callbacks=[average]).fit(net, Blobs())
    expected = average.seen[0]
    for steps, weight in enumerate(average.seen[1:], start=1):
        share = min(0.9, (1 + steps) / (10 + steps))
        expected = share * expected + (1 - share) * weight
    assert torch.allclose(net.student.plain().fc.weight, expected, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_in_another_precision_are_averaged(precision):
    net, _ = fitted(Recipe(ema_decay=0.9), epochs=1, precision=precision)
    assert all(torch.isfinite(each).all() for each in state(net).values())


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_a_validation_leaves_the_average_as_it_is(precision):
    averages = []
    for often in (1, 8):
        average = EMA(decay=0.9)
        torch.manual_seed(0)
        net = build(CE(), decays=[50])
        trainer(max_epochs=1, callbacks=[average], precision=precision, val_check_interval=often).fit(net, Blobs())
        averages.append(state(average._average_model))
    assert largest_difference(*averages) == 0.0
    assert averages[0]["module.student.backbone.fc.weight"].dtype == torch.float32


def test_the_average_holds_no_teacher_and_reads_no_number_from_the_device():
    average = EMA(decay=0.9)
    net = build(KD(), teacher=teaching(create_model("resnet8", CLASSES)))
    trainer(max_epochs=1, callbacks=[average]).fit(net, Blobs())
    assert list(average._average_model.module.teachers) == []
    assert len(list(net.teachers)) == 1
    module = nn.BatchNorm1d(3, device="meta")  # where a number cannot be read
    copy = _Average(module, torch.device("meta"), average.decay_after)
    for _ in range(3):
        copy.update_parameters(module)
    assert int(copy.n_averaged) == 3


def test_whole_numbers_are_copied_not_averaged():
    net, _ = fitted(Recipe(ema_decay=0.9), epochs=2)
    counts = [value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")]
    assert {int(each) for each in counts} == {16}


def test_a_short_run_is_near_its_weights_whatever_the_decay():
    """Without a warm-up an average with decay 0.9999 is the random start."""
    plain, run = fitted(Recipe(), epochs=6)
    averaged, other = fitted(Recipe(ema_decay=0.9999), epochs=6)
    assert float(other.callback_metrics["val/acc"]) > float(run.callback_metrics["val/acc"]) - 0.15
    assert largest_difference(state(plain), state(averaged)) > 0


@pytest.mark.filterwarnings("ignore:.*`ckpt_path`.*")
def test_early_stopping_stops_and_says_so(capsys):
    _, run = fitted(Recipe(early_stopping=2), epochs=30, lr=1e-9)  # val/acc never grows
    assert run.current_epoch == 3
    assert "3" in capsys.readouterr().out
    (callback,) = run.early_stopping_callbacks
    assert isinstance(callback, StopEarly)
    assert callback.monitor == "val/acc"


def test_without_these_settings_no_callback_is_added():
    _, run = fitted(Recipe(), epochs=1)
    assert not any(isinstance(each, (EMA, EarlyStopping)) for each in run.callbacks)


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}])
def test_early_stopping_needs_validation(options):
    with pytest.raises(ACKDError, match="early_stopping is 2"):
        fitted(Recipe(early_stopping=2), **options)


class Far(Blobs):
    """Validation images that are far outside those of training."""

    def _data(self, seed, count):
        image, target = super()._data(seed, count).tensors
        return TensorDataset(image * 1e7 if seed == 1 else image, target)


def test_a_diverged_first_epoch_is_said_once_with_a_remedy():
    with pytest.warns(UserWarning, match=r"warmup_epochs") as caught:
        fitted(Recipe(), data=Far(), epochs=3)
    assert sum("validation loss" in str(each.message) for each in caught) == 1


class One(IndexedBlobs):
    """Batches of 8 images and a last one of 1."""

    def __init__(self):
        super().__init__()
        self.count = 9

    def train_dataloader(self):
        return DataLoader(self._data(0, 9), batch_size=8, shuffle=False)


class Flat(torch.nn.Module):
    """A network with BatchNorm after global pooling, which cannot train on one image."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, SIZE), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
        self.fc = torch.nn.Linear(4, CLASSES)

    def forward(self, image):
        return self.fc(self.body(image))


@pytest.mark.parametrize(
    "method", [RKD(), SP(), VID(), DIST(), KD(), CRD(negatives=4)], ids=lambda method: type(method).__name__
)
def test_a_batch_of_one_image_trains(method):
    net = build(method)
    trainer(max_epochs=1, limit_val_batches=0).fit(net, One())
    assert all(math.isfinite(float(each.abs().sum())) for each in state(net).values())


@pytest.mark.parametrize(("method", "student"), [(CE, Flat), (ReviewKD, None), (KD, Flat)])
def test_batchnorm_that_cannot_train_on_one_image_is_named(method, student):
    with pytest.raises(ACKDError, match="drop_last"):
        trainer(max_epochs=1).fit(build(method(), student=student and student()), One())
