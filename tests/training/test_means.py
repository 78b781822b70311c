"""Means of logged terms: equal to those of Lightning, without its cost in every step."""

from __future__ import annotations

import collections
import csv

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from ackd_lightning import ACKD, CE, DistillationModule
from ackd_lightning.callbacks.progress import EpochLine
from ackd_lightning.training.means import TermMeans
from training.helpers import Blobs, build, largest_difference, module, state, trainer


def scalars(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_batches_count_by_their_size():
    means = TermMeans()
    means.add(scalars(loss=1.0, kd=4.0), 3)
    means.add(scalars(loss=5.0, kd=0.0), 1)
    assert {name: float(value) for name, value in means.compute().items()} == {"loss": 2.0, "kd": 3.0}


def test_a_term_is_averaged_over_the_steps_that_have_it():
    means = TermMeans()
    means.add(scalars(loss=1.0), 2)
    means.add(scalars(loss=3.0, extra=8.0), 2)
    means.add(scalars(extra=2.0), 4)
    assert {name: float(value) for name, value in means.compute().items()} == {"loss": 2.0, "extra": 4.0}


def test_reading_does_not_reset():
    means = TermMeans()
    means.add(scalars(loss=1.0), 1)
    assert float(means.compute()["loss"]) == 1.0
    means.add(scalars(loss=2.0), 1)
    assert float(means.compute()["loss"]) == 1.5
    means.reset()
    assert means.compute() == {}
    means.add(scalars(loss=7.0), 1)
    assert float(means.compute()["loss"]) == 7.0


def test_no_graph_is_kept_and_half_precision_is_summed_in_float32():
    means = TermMeans()
    weight = torch.ones((), requires_grad=True)
    for _ in range(1000):
        means.add({"loss": weight * torch.tensor(1.0, dtype=torch.float16)}, 100)  # sums to more than float16 holds
    value = means.compute()["loss"]
    assert not value.requires_grad
    assert value.dtype is torch.float32
    assert float(value) == 1.0


class Counting(DistillationModule):
    """Keep the loss of every step, and count what Lightning logs."""

    def on_train_start(self):
        super().on_train_start()
        self.losses, self.asked = [], collections.Counter()

    def log_terms(self, loss, terms, student, batch):
        self.losses.append((self.current_epoch, float(loss.detach()), len(batch.target)))
        super().log_terms(loss, terms, student, batch)

    def log(self, name, *arguments, **options):
        self.asked[name] += name.startswith("train/")
        super().log(name, *arguments, **options)


@pytest.mark.parametrize(("every", "expected"), [(3, 2), (1, 8)])
def test_lightning_logs_in_the_steps_that_are_written_and_at_the_end_of_an_epoch(tmp_path, every, expected):
    net = build(CE(), kind=Counting)
    logger = CSVLogger(tmp_path)
    fitting = trainer(logger=logger, log_every_n_steps=every, max_epochs=2, limit_train_batches=4)
    fitting.fit(net, datamodule=Blobs())
    assert +net.asked == {"train/loss_step": expected, "train/loss": 2, "train/ce": 2, "train/acc": 2}
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [row["train/loss_step"] for row in rows if row.get("train/loss_step")]
    assert len(steps) == expected
    for epoch in range(2):
        losses = [(value, size) for number, value, size in net.losses if number == epoch]
        mean = sum(value * size for value, size in losses) / sum(size for _, size in losses)
        written = [float(row["train/loss"]) for row in rows if row["epoch"] == str(epoch) and row.get("train/loss")]
        assert written == pytest.approx([mean], rel=1e-5)


def test_values_of_auxiliary_steps_are_means_of_the_epoch_too(tmp_path):
    net, logger = module(), CSVLogger(tmp_path)
    trainer(logger=logger, max_epochs=1).fit(net, datamodule=Blobs())
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        last = {key: value for row in csv.DictReader(file) for key, value in row.items() if value}
    assert 0 <= float(last["train/disc_acc"]) <= 1
    assert float(last["train/disc_loss"]) > 0
    assert float(last["train/ce_aux"]) > 0


def test_an_empty_batch_of_values_counts_nothing():
    means = TermMeans()
    means.add({}, 4)
    assert means.compute() == {}
    means.add({"loss": torch.tensor([3.0])}, 4)  # a number of another shape
    assert means.compute()["loss"].shape == ()


class Quiet(ACKD):
    """ACKD whose discriminators log nothing."""

    def auxiliary_loss(self, *arguments):
        return super().auxiliary_loss(*arguments)[0], {}


def test_an_auxiliary_step_may_log_nothing():
    net, other = module(Quiet()), module(ACKD())
    for each in (net, other):
        trainer(max_epochs=1).fit(each, datamodule=Blobs())
    assert largest_difference(state(net), state(other)) == 0


class Reader(L.Callback):
    """Keep what a callback reads at the end of an epoch."""

    def __init__(self):
        self.found = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.found.append(float(trainer.callback_metrics["train/loss"]))


def test_callbacks_find_the_mean_of_the_epoch_that_has_just_ended():
    net, reader = build(CE(), kind=Counting), Reader()
    trainer(max_epochs=3, limit_train_batches=4, callbacks=[reader]).fit(net, datamodule=Blobs())
    for epoch, found in enumerate(reader.found):
        losses = [value for number, value, _ in net.losses if number == epoch]
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert len(set(reader.found)) == 3


def test_an_epoch_that_is_cut_short_has_its_own_mean(capsys):
    net = build(CE(), kind=Counting)
    fitting = trainer(max_epochs=3, max_steps=6, limit_train_batches=4, callbacks=[EpochLine()])
    fitting.fit(net, datamodule=Blobs())
    last = [value for number, value, _ in net.losses if number == 1]
    assert len(last) == 2
    expected = sum(last) / 2
    assert float(fitting.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-5)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 2")]
    assert f"loss {expected:.3f}" in lines[0]


def test_steps_are_not_logged_with_log_every_n_steps_0():
    net = build(CE(), kind=Counting)
    trainer(max_epochs=1, log_every_n_steps=0).fit(net, datamodule=Blobs())
    assert +net.asked == {"train/loss": 1, "train/ce": 1, "train/acc": 1}


def test_an_interrupted_epoch_leaves_nothing_to_the_next_fit():
    net = build(CE(), kind=Counting)
    net.means.add({"train/loss": torch.tensor(1e9)}, 1000)
    fitting = trainer(max_epochs=1)
    fitting.fit(net, datamodule=Blobs())
    assert float(fitting.callback_metrics["train/loss"]) < 100
