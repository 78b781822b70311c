from __future__ import annotations

import pytest
import torch

from ackd_lightning.random import mix, seed_device, stateless_bits, stateless_integers, stateless_uniform


def test_tensor_hash_equals_the_integer_hash():
    epoch = torch.tensor([0, 3, -1, 2**40])
    index = torch.tensor([0, 7, 49_999, 5])
    expected = [mix(2**63 + 5, e, i, 9) for e, i in zip(epoch.tolist(), index.tolist(), strict=True)]
    assert stateless_bits(2**63 + 5, epoch, index, 9).tolist() == expected
    assert all(0 <= value < 2**63 for value in expected)


@pytest.mark.parametrize("other", [(1, 0, 5), (0, 1, 5), (0, 0, 6)], ids=["seed", "epoch", "stream"])
def test_every_key_changes_the_numbers(other):
    index = torch.arange(1000)
    seed, epoch, stream = other
    same = stateless_bits(0, 0, index, 5) == stateless_bits(seed, epoch, index, stream)
    assert not same.any()


def test_numbers_are_uniform():
    index = torch.arange(90_000)
    counts = torch.bincount(stateless_integers(9, 0, 0, index, 1), minlength=9)
    # 10,000 expected in each of 9 bins, standard deviation 94
    assert (counts - 10_000).abs().max() < 5 * 94
    values = stateless_uniform(0, 0, index, 2)
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean().item() - 0.5) < 5 * (1 / 12 / 90_000) ** 0.5
    neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(neighbours.item()) < 5 / 300


def test_the_device_s_generator_is_seeded_without_a_trace_of_the_stack(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "manual_seed", asked.append)
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("seeds every device"))
    seed_device(7, torch.device("cpu"))
    first = torch.rand(3)
    assert asked == []
    seed_device(7, torch.device("cuda"))
    assert asked == [7]
    assert torch.equal(torch.rand(3), first)
