from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import FitNet, Networks
from ackd_lightning.methods.fitnet import fitnet_loss
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import check_finite, twenty_steps


def feature(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def network(channels, sides):
    features = [feature(4, channels + stage, side, side, seed=stage) for stage, side in enumerate(sides)]
    shapes = NetSpec(4, tuple(tuple(each.shape[1:]) for each in features), features[-1].shape[1])
    return features, shapes, NetOutput(torch.zeros(4, 4), tuple(features), torch.empty(4, 0))


BATCH = Batch(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 3]), torch.arange(4))


def test_it_equals_loops_and_is_zero_at_equality():
    ours, theirs = feature(2, 3, 2, 2), feature(2, 3, 2, 2, seed=1)
    squares = [(a - b) ** 2 for a, b in zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True)]
    assert fitnet_loss(ours, theirs).item() == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert fitnet_loss(ours, ours).item() == 0.0


def test_weights_are_those_of_the_benchmark():
    assert FitNet().loss_weights == {"ce": 1.0, "hint": 100.0}
    assert FitNet(weight_ce=0.5, weight_hint=2.0).loss_weights == {"ce": 0.5, "hint": 2.0}


@pytest.mark.parametrize("sides", [((8, 8, 4, 2), (8, 8, 4, 2)), ((8, 8, 4, 2), (8, 8, 2, 1)), ((8, 4, 2), (8, 4, 4))])
def test_the_regressor_sees_the_second_stage_and_the_larger_map_is_pooled(sides):
    (ours, mine, student), (theirs, its, teacher) = network(3, sides[0]), network(5, sides[1])
    method = FitNet()
    method.build(Networks(student=mine, teachers=(its,)))
    assert method.layers == ((2, 2),)
    convolution, norm, _ = method.regressor
    side = min(sides[0][2], sides[1][2])
    guided, hint = (F.adaptive_avg_pool2d(each[2], side) for each in (ours, theirs))
    raw = torch.einsum("bchw,dc->bdhw", guided, convolution.weight[:, :, 0, 0])
    centred = raw - raw.mean(dim=(0, 2, 3), keepdim=True)
    expected = (centred / (centred.square().mean(dim=(0, 2, 3), keepdim=True) + norm.eps).sqrt()).clamp_min(0)
    terms = method(student, teacher, BATCH)
    assert set(terms) == {"ce", "hint"}
    assert terms["hint"].item() == pytest.approx((expected - hint).square().mean().item(), rel=1e-4)
    assert not list(method.buffers())
    terms["hint"].backward()
    assert {index for index, each in enumerate(ours) if each.grad is not None} == {2}
    assert all(each.grad is None for each in theirs)
    assert all(each.grad.abs().sum() > 0 for each in method.parameters())


def test_of_several_partners_the_deepest_is_the_hint():
    (_, mine, student), (theirs, its, teacher) = network(3, (8, 8, 4)), network(5, (8, 8, 4, 4))
    for stage, expected in ((1, 1), (2, 3)):
        method = FitNet(hint_stage=stage)
        method.build(Networks(student=mine, teachers=(its,)))
        assert method.layers == ((stage, expected),)
        assert method(student, teacher, BATCH)["hint"].isfinite()
        assert method.regressor[0].out_channels == theirs[expected].shape[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_precision_is_finite_float32(dtype):
    signs = feature(4, 3, 4, 4).detach().sign()
    ours = (6e4 * signs).to(dtype).requires_grad_()
    loss = fitnet_loss(ours, (-6e4 * signs).to(dtype))
    check_finite(loss, ours)


def test_twenty_steps_lower_it():
    (_, mine, student), (_, its, teacher) = network(3, (8, 8, 4)), network(5, (8, 8, 4))
    method = FitNet()
    method.build(Networks(student=mine, teachers=(its,)))
    leaves = [*method.parameters(), student.features[2]]
    losses = twenty_steps(lambda: method(student, teacher, BATCH)["hint"], leaves, lr=1.0)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("stage", [0, -1])
def test_a_stage_before_the_first_is_refused(stage):
    with pytest.raises(ACKDError, match=rf"hint_stage is {stage} in FitNet; it must be at least 1"):
        FitNet(hint_stage=stage)


def test_a_stage_that_is_not_there_is_refused():
    (_, mine, _), (_, its, _) = network(3, (8, 8, 4)), network(5, (8, 8, 4, 2))
    with pytest.raises(ACKDError, match=r"hint_stage is 3 in method FitNet and the student has 2 stages"):
        FitNet(hint_stage=3).build(Networks(student=mine, teachers=(its,)))
    with pytest.raises(ACKDError, match=r"the teacher.*method FitNet"):
        FitNet().build(Networks(student=mine, teachers=(NetSpec(4),)))


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ACKDError, match=r"fitnet_loss got a feature \(2, 3, 2, 2\) of the student and \(2, 3, 1, 2\)"):
        fitnet_loss(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 1, 2))
