"""Means of logged terms: what Lightning's own would say, without its cost in every step."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from ackd_lightning import DistillationModule
from ackd_lightning.training.means import TermMeans
from training.helpers import CLASSES, SIZE, Blobs, TinyNet, module, trainer


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


def test_looking_does_not_stop_the_count_and_reset_does():
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
    """Notes the value of each step, and how often Lightning is asked to log."""

    def on_train_start(self):
        super().on_train_start()
        self.losses, self.calls = [], 0

    def log_terms(self, loss, terms, batch):
        self.losses.append((self.current_epoch, float(loss.detach()), len(batch.target)))
        before = self.calls
        super().log_terms(loss, terms, batch)
        self.in_steps = getattr(self, "in_steps", 0) + self.calls - before

    def log(self, *arguments, **options):
        self.calls += 1
        super().log(*arguments, **options)


@pytest.mark.parametrize(("every", "expected"), [(3, 2), (1, 8)])
def test_lightning_is_asked_in_the_steps_that_are_written_and_at_the_epoch_s_end(tmp_path, every, expected):
    net = Counting(TinyNet(), CLASSES, input_size=SIZE)
    logger = CSVLogger(tmp_path)
    fitting = trainer(logger=logger, log_every_n_steps=every, max_epochs=2, limit_train_batches=4)
    fitting.fit(net, datamodule=Blobs())
    assert net.in_steps == expected
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = [row["train/loss_step"] for row in rows if row.get("train/loss_step")]
    assert len(steps) == expected
    for epoch in range(2):
        losses = [(value, size) for number, value, size in net.losses if number == epoch]
        mean = sum(value * size for value, size in losses) / sum(size for _, size in losses)
        written = [float(row["train/loss"]) for row in rows if row["epoch"] == str(epoch) and row.get("train/loss")]
        assert written == pytest.approx([mean], rel=1e-5)


def test_players_values_are_means_of_the_epoch_too(tmp_path):
    net, logger = module(), CSVLogger(tmp_path)
    trainer(logger=logger, max_epochs=1).fit(net, datamodule=Blobs())
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        last = {key: value for row in csv.DictReader(file) for key, value in row.items() if value}
    assert 0 <= float(last["disc/acc"]) <= 1
    assert float(last["disc/loss"]) > 0
    assert float(last["train/ce_aux"]) > 0


def test_an_interrupted_epoch_leaves_nothing_to_the_next_fit():
    net = Counting(TinyNet(), CLASSES, input_size=SIZE)
    net.means.add({"train/loss": torch.tensor(1e9)}, 1000)
    fitting = trainer(max_epochs=1)
    fitting.fit(net, datamodule=Blobs())
    assert float(fitting.callback_metrics["train/loss"]) < 100
