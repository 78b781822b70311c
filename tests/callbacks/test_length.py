"""The length of a fit in epochs, where steps or time limit it."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, IterableDataset

from ackd_lightning import CE
from ackd_lightning.callbacks.length import epochs_before_fit, epochs_of_fit
from ackd_lightning.callbacks.progress import EpochLine, _at_most
from ackd_lightning.callbacks.summary import RunSummary
from ackd_lightning.training import Recipe
from training.helpers import Blobs, build, trainer

BATCHES = 8


@pytest.mark.parametrize(
    ("epochs", "steps", "accumulate", "expected"),
    [
        (60, -1, 1, 60),
        (60, 10, 1, 2),
        (60, 16, 1, 2),
        (60, 17, 1, 3),
        (2, 100, 1, 2),
        (-1, 20, 1, 3),
        (60, 10, 3, 4),  # three steps in an epoch of eight batches
        (-1, -1, 1, None),
    ],
)
def test_epochs_of_a_limit_of_steps(epochs, steps, accumulate, expected):
    given = SimpleNamespace(
        max_epochs=epochs, max_steps=steps, accumulate_grad_batches=accumulate, num_training_batches=BATCHES
    )
    assert epochs_of_fit(given) == expected
    assert epochs_of_fit(given, math.inf) == (epochs if epochs > 0 else None)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("limit", "expected"), [(1.0, 2), (0.5, 3), (5, 2), ("stream", 60)], ids=["all", "half", "five", "stream"]
)
def test_the_length_is_known_before_the_loaders_are(limit, expected):
    share = 1.0 if limit == "stream" else limit
    fitting = trainer(max_epochs=60, max_steps=10, limit_train_batches=share)
    given = Blobs()
    given.trainer = fitting
    if limit == "stream":
        given.train_dataloader = lambda: DataLoader(Stream())
    fitting.fit_loop._data_source.instance = given
    assert epochs_before_fit(fitting) == expected


class Rates(L.Callback):
    """Keep the learning rate of each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedule_warm_up_and_progress_end_with_the_steps(capsys):
    rates = Rates()
    module = build(CE(), lr_scheduler=functools.partial(CosineAnnealingLR, T_max=0), recipe=Recipe(warmup_epochs=3))
    fitting = trainer(max_epochs=60, max_steps=3 * BATCHES + 1, callbacks=[rates, EpochLine()])
    fitting.fit(module, Blobs())
    said = capsys.readouterr().out
    assert rates.seen[2] == pytest.approx(0.05 * (1 + math.cos(math.pi * 2 / 4)) / 2 * 3 / 4)
    assert "takes 3 of 4 epochs" in said
    assert "epoch 4/4" in said
    assert module._epochs == 4


def test_the_time_left_is_at_most_that_of_the_limit():
    timed = trainer(max_time="00:00:01:00")
    assert _at_most(timed, 3600.0) <= 60.0
    assert _at_most(timed, 5.0) == 5.0
    assert _at_most(trainer(), 3600.0) == 3600.0


def test_an_accuracy_stands_where_it_was_measured(tmp_path, capsys):
    """Neither the line of an epoch nor the table shows that of an earlier one as if it were its own."""
    summary = RunSummary(tmp_path, config="c")
    fitting = trainer(max_epochs=3, check_val_every_n_epoch=2, callbacks=[summary, EpochLine(summary)])
    fitting.fit(build(CE()), Blobs())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert ["val acc" in line for line in lines] == [False, True, False]
    summary.show()
    assert "epoch 2 of 3" in capsys.readouterr().out


def test_an_accuracy_inside_the_last_epoch_is_not_that_of_the_last_weights(tmp_path, capsys):
    summary = RunSummary(tmp_path, config="c")
    trainer(max_epochs=1, val_check_interval=3, callbacks=[summary]).fit(build(CE()), Blobs())
    assert not summary.up_to_date
    summary.show()
    assert "step 6 of 8" in capsys.readouterr().out


@pytest.mark.parametrize(("every", "said"), [(3, True), (4, False), (BATCHES, False)])
def test_a_validation_inside_a_step_is_told_of(capsys, every, said):
    fitting = trainer(max_epochs=1, accumulate_grad_batches=2, val_check_interval=every)
    fitting.fit(build(CE()), Blobs())
    assert ("lacks the gradients" in capsys.readouterr().out) is said
