from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import VID, Networks
from ackd_lightning.methods.vid import LEAST_VARIANCE, vid_loss
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import check_finite, twenty_steps

GOLDEN = Path(__file__).parents[1] / "golden"


def feature(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def spec(features):
    return NetSpec(4, tuple(tuple(each.shape[1:]) for each in features), features[-1].shape[1])


def output(features, logits=None):
    count = len(features[0])
    return NetOutput(torch.zeros(count, 4) if logits is None else logits, tuple(features), torch.empty(count, 0))


def batch_of(count, target=None):
    return Batch(torch.zeros(count, 3, 2, 2), torch.zeros(count, dtype=torch.long) if target is None else target, None)


def slow(mean, log_scale, teacher):
    """One number after the other, in double precision."""
    values = []
    for image in range(len(mean)):
        for channel in range(mean.shape[1]):
            variance = math.log(1 + math.exp(float(log_scale[channel]))) + 1e-5
            for one, two in zip(mean[image, channel].flatten(), teacher[image, channel].flatten(), strict=True):
                values.append(0.5 * ((float(one) - float(two)) ** 2 / variance + math.log(variance)))
    return sum(values) / len(values)


def test_stages_and_weighted_sum_equal_the_golden_of_the_benchmark():
    with np.load(GOLDEN / "losses.npz") as arrays:
        load = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    golden = json.loads((GOLDEN / "losses.json").read_text())["vid"]["values"]
    ours, theirs = ([torch.full((8, 3, 32, 32), torch.nan)] for _ in range(2))
    ours += [load[f"rs_f{stage}"] for stage in (1, 2, 3)]
    theirs += [load[f"rt_f{stage}"] for stage in (1, 2, 3)]
    method = VID()
    method.build(Networks(student=spec(ours), teachers=(spec(theirs),)))
    assert method.layers == ((1, 1), (2, 2), (3, 3))
    for name, parameter in method.named_parameters():
        _, index, rest = name.split(".", 2)
        if rest == "log_scale":
            start = torch.full_like(parameter, golden["log_scale_at_init"])
            torch.testing.assert_close(parameter.detach(), start)
        parameter.data = load[f"vid{int(index) + 1}/{rest.replace('mean', 'regressor')}"]
    for stage, gaussian in enumerate(method.gaussians, 1):
        assert gaussian(ours[stage], theirs[stage]).item() == pytest.approx(golden[f"vid.stage{stage}"], rel=2e-4)
    batch = batch_of(8, load["target"])
    terms = method(output(ours, load["logits_s"]), output(theirs, load["logits_t"]), batch)
    weights = method.loss_weights
    assert set(terms) == set(weights) == {"ce", "vid"}
    assert terms["vid"].item() == pytest.approx(golden["vid.loss"], rel=2e-4)
    total = sum(weights[name] * terms[name] for name in terms).item()
    assert total == pytest.approx(golden["RepDistiller.total(-r 1 -a 0 -b 1)"], rel=2e-4)


def test_it_equals_loops():
    mean, teacher, log_scale = feature(3, 4, 2, 3), feature(3, 4, 2, 3, seed=1), feature(4, seed=2)
    value = vid_loss(mean, log_scale, teacher).item()
    assert value == pytest.approx(slow(mean.detach(), log_scale.detach(), teacher.detach()), rel=1e-5)


def test_the_best_prediction_is_the_feature_and_the_best_variance_the_mean_squared_error():
    teacher = feature(3, 4, 2, 2)
    mean = teacher.detach().clone().requires_grad_()
    vid_loss(mean, feature(4), teacher).backward()
    assert torch.equal(mean.grad, torch.zeros_like(mean))
    other = feature(3, 4, 2, 2, seed=1)
    error = (other - teacher).detach().square().mean(dim=(0, 2, 3))
    best = (error - LEAST_VARIANCE).expm1().log().requires_grad_()
    vid_loss(other, best, teacher).backward()
    torch.testing.assert_close(best.grad, torch.zeros(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variance", [2e-5, 0.1, 5.0, 1000.0])
def test_the_variance_starts_as_told(variance):
    method = VID(init_variance=variance)
    method.build(Networks(student=spec([feature(1, 2, 4, 4)] * 2), teachers=(spec([feature(1, 3, 4, 4)] * 2),)))
    log_scale = method.gaussians[0].log_scale
    got = torch.nn.functional.softplus(log_scale) + LEAST_VARIANCE
    torch.testing.assert_close(got, torch.full((3,), variance), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 6e4])
def test_extreme_half_precision_is_finite_float32(dtype, scale):
    signs = feature(4, 3, 4, 4).detach().sign()
    mean, log_scale = (6e4 * signs).to(dtype).requires_grad_(), torch.full((3,), scale, requires_grad=True)
    loss = vid_loss(mean, log_scale, (-6e4 * signs).to(dtype))
    check_finite(loss, mean, log_scale)


def test_the_variance_has_a_floor():
    mean, log_scale = feature(4, 3, 4, 4), torch.full((3,), -6e4, requires_grad=True)
    loss = vid_loss(mean, log_scale, mean)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(1e-5), rel=1e-5)
    assert log_scale.grad.isfinite().all()


def test_twenty_steps_lower_it():
    ours, theirs = [feature(4, 3, 2, 2, seed=seed) for seed in (0, 1)], [feature(4, 5, 2, 2, seed=2)] * 2
    method = VID(init_variance=0.1)
    method.build(Networks(student=spec(ours), teachers=(spec(theirs),)))
    losses = twenty_steps(lambda: method(output(ours), output(theirs), batch_of(4))["vid"], method.parameters(), lr=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_every_stage_of_unequal_networks_is_predicted_and_the_teacher_learns_nothing():
    ours = [feature(2, 3, side, side, seed=side) for side in (8, 8, 4, 2)]
    theirs = [feature(2, 5, side, side, seed=side) for side in (8, 4, 1)]
    method = VID()
    method.build(Networks(student=spec(ours), teachers=(spec(theirs),)))
    assert {pair[0] for pair in method.layers} == {1, 2, 3}
    assert {pair[1] for pair in method.layers} == {1, 2}
    term = method(output(ours), output(theirs), batch_of(2))["vid"]
    expected = 0.0
    for gaussian, (n, m) in zip(method.gaussians, method.layers, strict=True):
        side = min(ours[n].shape[2], theirs[m].shape[2])
        student, teacher = (torch.nn.functional.adaptive_avg_pool2d(each, side) for each in (ours[n], theirs[m]))
        expected += vid_loss(gaussian.mean(student), gaussian.log_scale, teacher).item()
    assert term.item() == pytest.approx(expected, rel=1e-5)
    term.backward()
    assert ours[0].grad is None
    assert all(each.grad.abs().sum() > 0 for each in ours[1:])
    assert all(each.grad.abs().sum() > 0 for each in method.parameters())
    assert all(each.grad is None for each in theirs)


def test_it_takes_a_half_precision_teacher():
    ours, theirs = [feature(2, 3, 4, 4)] * 2, [feature(2, 5, 2, 2).bfloat16()] * 2
    method = VID()
    method.build(Networks(student=spec(ours), teachers=(spec(theirs),)))
    assert method(output(ours), output(theirs), batch_of(2))["vid"].dtype is torch.float32


@pytest.mark.parametrize("variance", [-1.0, 0.0, 1e-5])
def test_a_variance_that_cannot_be_is_refused(variance):
    with pytest.raises(ACKDError, match=rf"init_variance is {variance} in VID; it must be above 1e-05"):
        VID(init_variance=variance)


@pytest.mark.parametrize("shapes", [((2, 3, 4, 4), (4,), (2, 3, 4, 4)), ((2, 3, 4, 4), (3,), (2, 3, 1, 4))])
def test_shapes_that_would_broadcast_are_refused(shapes):
    with pytest.raises(ACKDError, match="vid_loss got a prediction"):
        vid_loss(*(torch.zeros(shape) for shape in shapes))


def test_networks_without_stages_are_refused():
    with pytest.raises(ACKDError, match=r"the student.*method VID"):
        VID().build(Networks(student=NetSpec(4), teachers=(spec([feature(1, 3, 4, 4)] * 2),)))
