from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import AT, Networks
from ackd_lightning.methods.at import at_loss, attention_map
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import check_finite, twenty_steps

GOLDEN = Path(__file__).parents[1] / "golden"


def maps(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]


def spec(*shapes):
    return NetSpec(4, tuple(shapes), shapes[-1][0])


def output(features, logits=None):
    none = torch.empty(len(features[0]), 0)
    return NetOutput(torch.zeros(len(none), 4) if logits is None else logits, tuple(features), none)


def slow(student, teacher):
    """One image, one position, one channel after the other; maps of equal size."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        images, _, height, width = ours.shape
        squares = 0.0
        for image in range(images):
            rows = []
            for feature in (ours[image].detach(), theirs[image].detach()):
                row = [
                    sum(float(channel[y, x]) ** 2 for channel in feature) / len(feature)
                    for y in range(height)
                    for x in range(width)
                ]
                norm = sum(value**2 for value in row) ** 0.5
                rows.append([value / norm for value in row])
            squares += sum((a - b) ** 2 for a, b in zip(*rows, strict=True))
        total += squares / (images * height * width)
    return total


def test_stages_and_weighted_sum_equal_the_golden_of_the_benchmark():
    with np.load(GOLDEN / "losses.npz") as arrays:
        load = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    golden = json.loads((GOLDEN / "losses.json").read_text())["at"]["values"]
    ours, theirs = ([load[f"{net}_f{stage}"] for stage in (1, 2, 3)] for net in ("rs", "rt"))
    for stage in range(3):
        value = at_loss(ours[stage : stage + 1], theirs[stage : stage + 1]).item()
        assert value == pytest.approx(golden[f"at.stage{stage + 1}"], rel=2e-4)
    method, shapes = AT(), spec((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8))
    method.build(Networks(student=shapes, teachers=(shapes,)))
    assert method.layers == ((1, 1), (2, 2), (3, 3))
    batch = Batch(torch.zeros(8, 3, 2, 2), load["target"], torch.arange(8))
    stem = torch.full((8, 16, 32, 32), torch.nan)
    terms = method(output([stem, *ours], load["logits_s"]), output([stem, *theirs], load["logits_t"]), batch)
    weights = method.loss_weights
    assert set(terms) == set(weights) == {"ce", "at"}
    assert terms["at"].item() == pytest.approx(golden["at.loss"], rel=2e-4)
    total = sum(weights[name] * terms[name] for name in terms).item()
    assert total == pytest.approx(golden["RepDistiller.total(-r 1 -a 0 -b 1000)"], rel=2e-4)


def test_it_equals_loops():
    ours, theirs = maps((3, 4, 3, 2), (3, 6, 2, 2)), maps((3, 5, 3, 2), (3, 2, 2, 2), seed=1)
    assert at_loss(ours, theirs).item() == pytest.approx(slow(ours, theirs), rel=1e-5)


def test_the_larger_map_is_pooled_before_it_is_squared():
    (large,), (small,) = maps((3, 4, 4, 6)), maps((3, 5, 2, 2), seed=1)
    means = large.reshape(3, 4, 2, 2, 2, 3).mean(dim=(3, 5))
    expected = slow([means], [small])
    assert at_loss([large], [small]).item() == pytest.approx(expected, rel=1e-5)
    assert at_loss([small], [large]).item() == pytest.approx(expected, rel=1e-5)


def test_channels_signs_and_strength_do_not_matter_and_places_do():
    (ours,), (theirs,) = maps((3, 4, 3, 3)), maps((3, 4, 3, 3), seed=1)
    assert at_loss([ours], [ours]).item() == 0.0
    per_image = torch.tensor([0.1, -1.0, 30.0]).reshape(3, 1, 1, 1)
    changed = theirs.flip(1).repeat(1, 2, 1, 1) * per_image
    value = at_loss([ours], [theirs]).item()
    assert at_loss([ours], [changed]).item() == pytest.approx(value, rel=1e-4)
    assert at_loss([ours], [theirs.flip(2)]).item() != pytest.approx(value, rel=1e-2)


def test_a_map_of_zeros_has_no_attention_and_no_infinite_gradient():
    dead = torch.zeros(2, 3, 2, 2, requires_grad=True)
    assert torch.equal(attention_map(dead), torch.zeros(2, 4))
    at_loss([dead], maps((2, 3, 2, 2))).backward()
    assert dead.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_is_finite_float32(dtype):
    signs = torch.sign(maps((2, 4, 2, 2))[0].detach())
    ours = (6e4 * signs * torch.arange(4).reshape(2, 2) / 3).to(dtype).requires_grad_()
    loss = at_loss([ours], [(6e4 * signs.flip(0)).to(dtype)])
    check_finite(loss, ours)


def test_twenty_steps_lower_it():
    ours, theirs = maps((3, 4, 3, 3)), maps((3, 4, 3, 3), seed=1)
    losses = twenty_steps(lambda: at_loss(ours, theirs), ours, lr=10.0)
    assert losses[-1] < 0.5 * losses[0]


def test_every_stage_of_unequal_networks_is_compared_and_only_the_student_learns():
    ours, theirs = maps(*[(2, 3, side, side) for side in (8, 8, 4, 4, 2)]), maps(*[(2, 5, s, s) for s in (8, 8, 2)])
    method = AT()
    method.build(
        Networks(
            student=spec(*(tuple(each.shape[1:]) for each in ours)),
            teachers=(spec(*(tuple(each.shape[1:]) for each in theirs)),),
        )
    )
    assert {pair[0] for pair in method.layers} == {1, 2, 3, 4}
    assert {pair[1] for pair in method.layers} == {1, 2}
    batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.arange(2))
    term = method(output(ours), output(theirs), batch)["at"]
    assert term.item() == pytest.approx(sum(at_loss([ours[n]], [theirs[m]]).item() for n, m in method.layers))
    term.backward()
    assert ours[0].grad is None
    assert all(each.grad.abs().sum() > 0 for each in ours[1:])
    assert all(each.grad is None for each in theirs)


@pytest.mark.parametrize("counts", [(0, 0), (1, 2), (2, 1)])
def test_features_that_are_no_pairs_are_refused(counts):
    ours, theirs = (maps(*[(2, 3, 2, 2)] * count) for count in counts)
    with pytest.raises(ACKDError, match=rf"at_loss got {counts[0]} features of the student and {counts[1]} of"):
        at_loss(ours, theirs)


def test_networks_without_stages_are_refused():
    with pytest.raises(ACKDError, match=r"the student.*method AT"):
        AT().build(Networks(student=NetSpec(4), teachers=(spec((3, 8, 8), (3, 4, 4)),)))
