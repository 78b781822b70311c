"""Synthetic data and fresh weights in place of missing ones."""

from __future__ import annotations

import torch
from timing import synthetic
from timing.synthetic import SyntheticDataModule, fresh_network, usable

from ackd_lightning.data import CIFAR100DataModule, DigitsDataModule
from ackd_lightning.models.zoo import create_model


def test_missing_data_are_replaced_by_as_many_random_images_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "_LARGEST", 2**22)
    notes: list[str] = []
    missing = CIFAR100DataModule(tmp_path, batch_size=16, num_workers=0)
    data = usable(missing, notes)
    assert isinstance(data, SyntheticDataModule)
    assert data.num_train_samples == 50_000
    assert (data.num_classes, data.input_size, data.batch_size) == (100, 32, 16)
    assert (data.mean, data.std) == (missing.mean, missing.std)
    assert len(notes) == 1
    assert "50,000 random images of 32 x 32" in notes[0]
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch.image.shape == (16, 3, 32, 32)
    assert len({image.sum().item() for image in batch.image}) == 16
    assert data.train_targets.unique().tolist() == list(range(100))
    assert list(tmp_path.iterdir()) == []


def test_existing_data_are_used():
    digits, notes = DigitsDataModule(batch_size=4), list[str]()
    assert usable(digits, notes) is digits
    assert notes == []


def test_a_network_with_fresh_weights_has_outputs_of_usual_size():
    network = fresh_network("resnet56", 10, 16, {})
    assert not network.training
    largest = network(torch.randn(4, 3, 16, 16)).abs().max()
    untouched = create_model("resnet56", 10).eval()(torch.randn(4, 3, 16, 16)).abs().max()
    assert largest < 100 < untouched
    assert {each.momentum for each in network.modules() if isinstance(each, torch.nn.BatchNorm2d)} == {0.1}
