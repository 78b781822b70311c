"""Negatives: which are drawn, how often, and that compiling changes none."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.crd_negatives import NegativeSampler

TARGETS = torch.arange(40) % 5
STEP = torch.tensor(3)


def sampler(targets=TARGETS, *, count=50, seed=0):
    result = NegativeSampler(count, stream=7)
    result.set_targets(targets, seed)
    return result


@pytest.mark.parametrize(
    "targets",
    [TARGETS, torch.tensor([0] * 30 + [1] + [3] * 2), torch.tensor([2, 0, 0, 0, 5, 0])],
    ids=["even", "singleton and empty class", "mixed order"],
)
def test_all_other_classes_are_drawn_evenly(targets):
    negatives = sampler(targets, count=20000)(torch.arange(len(targets)), targets, STEP)
    for image, row in enumerate(negatives):
        others = (targets != targets[image]).nonzero()[:, 0]
        counts = torch.bincount(row, minlength=len(targets))
        assert counts[targets == targets[image]].sum() == 0
        expected = 20000 / len(others)
        chi_square = ((counts[others] - expected) ** 2 / expected).sum().item()
        freedom = len(others) - 1
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 12


def test_a_draw_depends_on_seed_step_image_and_position_alone():
    draw, index = sampler(), torch.tensor([3, 17, 5, 30])
    drawn = draw(index, TARGETS[index], STEP)
    assert torch.equal(drawn, draw(index, TARGETS[index], STEP))
    assert torch.equal(drawn[2:], draw(index[2:], TARGETS[index[2:]], STEP))
    assert torch.equal(drawn[:, :20], sampler(count=20)(index, TARGETS[index], STEP))
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    assert (drawn != draw(index, TARGETS[index], STEP + 1)).float().mean() > 0.8
    assert (drawn != sampler(seed=1)(index, TARGETS[index], STEP)).float().mean() > 0.8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_it_draws_the_same():
    plain, quick = sampler(count=300), sampler(count=300)
    quick.compile(dynamic=False)
    index = torch.arange(40)
    for step in (0, 1, 2**40):
        number = torch.tensor(step)
        assert torch.equal(quick(index, TARGETS, number), plain(index, TARGETS, number))


def test_tables_are_in_no_checkpoint():
    assert sampler().state_dict() == {}
    assert {name for name, _ in sampler().named_buffers()} == set(NegativeSampler.TABLES)


def test_one_class_has_no_negatives():
    with pytest.raises(ACKDError, match="all 7 training images are of one class"):
        sampler(torch.full((7,), 3))
