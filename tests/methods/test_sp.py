from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import SP, Networks
from ackd_lightning.methods import sp as module
from ackd_lightning.methods.sp import sp_loss
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import check_finite, twenty_steps

GOLDEN = Path(__file__).parents[1] / "golden"


def feature(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def output(last, logits=None):
    count = len(last)
    before = torch.full((count, 2, 4, 4), torch.nan)
    logits = torch.zeros(count, 4) if logits is None else logits
    return NetOutput(logits, (before, before, last), last.mean(dim=(2, 3)))


def built(ours, theirs):
    method = SP()
    mine, its = (NetSpec(4, ((2, 4, 4), (2, 4, 4), tuple(each.shape[1:])), each.shape[1]) for each in (ours, theirs))
    method.build(Networks(student=mine, teachers=(its,)))
    return method


def slow(ours, theirs):
    """One pair of images after the other."""
    count, grams = len(ours), []
    for net in (ours.detach(), theirs.detach()):
        gram = [[sum(float(x) for x in (one * two).flatten()) for two in net] for one in net]
        grams.append([[value / sum(each**2 for each in row) ** 0.5 for value in row] for row in gram])
    return sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(count) for j in range(count)) / count**2


def test_the_weighted_sum_equals_the_golden_of_the_benchmark():
    with np.load(GOLDEN / "losses.npz") as arrays:
        load = {name: torch.from_numpy(arrays[name]) for name in ("rs_f3", "rt_f3", "logits_s", "logits_t", "target")}
    golden = json.loads((GOLDEN / "losses.json").read_text())["sp"]["values"]
    method = built(load["rs_f3"], load["rt_f3"])
    assert method.layers == ((2, 2),)
    batch = Batch(torch.zeros(8, 3, 2, 2), load["target"], torch.arange(8))
    terms = method(output(load["rs_f3"], load["logits_s"]), output(load["rt_f3"], load["logits_t"]), batch)
    weights = method.loss_weights
    assert set(terms) == set(weights) == {"ce", "sp"}
    assert terms["sp"].item() == pytest.approx(golden["sp.loss"], rel=2e-4)
    total = sum(weights[name] * terms[name] for name in terms).item()
    assert total == pytest.approx(golden["RepDistiller.total(-r 1 -a 0 -b 3000)"], rel=2e-4)


def test_it_equals_loops_for_features_of_unequal_shape():
    ours, theirs = feature(4, 3, 2, 2), feature(4, 5, 3, 3, seed=1)
    assert sp_loss(ours, theirs).item() == pytest.approx(slow(ours, theirs), rel=1e-5)


def test_rotation_and_scale_of_the_feature_space_and_order_of_images_do_not_matter():
    ours, theirs = feature(6, 5), feature(6, 5, seed=1)
    rotation = torch.linalg.qr(feature(5, 5, seed=2).detach()).Q
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    value = sp_loss(ours, theirs).item()
    assert sp_loss(ours, ours).item() == 0.0
    assert sp_loss(3.0 * ours @ rotation, ours).item() == pytest.approx(0.0, abs=1e-12)
    assert sp_loss(3.0 * ours @ rotation, theirs).item() == pytest.approx(value, rel=1e-4)
    assert sp_loss(ours[order], theirs[order]).item() == pytest.approx(value, rel=1e-4)
    assert sp_loss(ours[order], theirs).item() != pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_is_finite_float32(dtype):
    signs = feature(4, 3, 2, 2).detach().sign()
    ours = (6e4 * signs).to(dtype).requires_grad_()
    loss = sp_loss(ours, (6e4 * signs.flip(0)).to(dtype))
    check_finite(loss, ours)


def test_autocast_does_not_round_it():
    ours, theirs = feature(4, 3, 2, 2), feature(4, 3, 2, 2, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sp_loss(ours, theirs)
    assert torch.equal(inside, sp_loss(ours, theirs))


def test_a_dead_image_has_no_infinite_gradient():
    ours = (feature(3, 2, 2, 2).detach() * torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1, 1)).requires_grad_()
    sp_loss(ours, feature(3, 2, 2, 2, seed=1)).backward()
    assert ours.grad.isfinite().all()


def test_twenty_steps_lower_it():
    ours, theirs = feature(6, 3, 2, 2), feature(6, 5, 2, 2, seed=1)
    losses = twenty_steps(lambda: sp_loss(ours, theirs), [ours], lr=10.0)
    assert losses[-1] < 0.5 * losses[0]


def test_images_of_other_processes_are_compared_and_only_the_student_learns(monkeypatch):
    """The other process holds the same images in reverse order."""
    monkeypatch.setattr(module, "whole_batch", lambda shard: torch.cat([shard, shard.flip(0)]))
    ours, theirs = feature(3, 2, 2, 2), feature(3, 5, 1, 1, seed=1)
    batch = Batch(torch.zeros(3, 3, 4, 4), torch.tensor([0, 1, 2]), torch.arange(3))
    term = built(ours, theirs)(output(ours), output(theirs), batch)["sp"]
    assert term.item() == pytest.approx(slow(*(torch.cat([each, each.flip(0)]) for each in (ours, theirs))), rel=1e-5)
    term.backward()
    assert ours.grad.abs().sum() > 0
    assert theirs.grad is None


def test_networks_without_stages_are_refused():
    with pytest.raises(ACKDError, match=r"the teacher.*method SP"):
        SP().build(Networks(student=NetSpec(4, ((3, 8, 8), (3, 4, 4)), 3), teachers=(NetSpec(4),)))
