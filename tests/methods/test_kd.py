from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import KD
from ackd_lightning.types import Batch, NetOutput

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_weighted_sum_equals_the_golden_of_the_benchmark():
    with np.load(GOLDEN / "losses.npz") as arrays:
        student, teacher, target = (torch.from_numpy(arrays[name]) for name in ("logits_s", "logits_t", "target"))
    golden = json.loads((GOLDEN / "losses.json").read_text())["kd"]["values"]
    none = torch.empty(8, 0)
    batch = Batch(torch.zeros(8, 3, 2, 2), target, torch.arange(8))
    method = KD()
    terms = method(NetOutput(student, None, none), NetOutput(teacher, None, none), batch)
    weights = method.loss_weights
    assert set(terms) == set(weights) == {"ce", "kd"}
    assert terms["kd"].item() == pytest.approx(golden["kd_T4.loss"], rel=2e-4)
    total = sum(weights[name] * terms[name] for name in terms).item()
    assert total == pytest.approx(golden["RepDistiller.total(-r 0.1 -a 0.9)"], rel=2e-4)


def test_temperature_and_weights_are_arguments(scene):
    here = scene(1)
    assert KD().loss_weights == {"ce": 0.1, "kd": 0.9}
    assert KD(weight_ce=1.0, weight_kd=2.0).loss_weights == {"ce": 1.0, "kd": 2.0}
    values = [KD(temperature=t)(here.student, here.teacher, here.batch)["kd"].item() for t in (1.0, 4.0)]
    p_s, p_t = here.z_s.softmax(dim=1), here.z_t.softmax(dim=1)
    assert values[0] == pytest.approx((p_t * (p_t / p_s).log()).sum(dim=1).mean().item(), rel=1e-4)
    assert values[0] != pytest.approx(values[1], rel=1e-2)


def test_only_the_target_learner_is_reached(scene):
    here = scene(1)
    gradients = here.gradients(KD()(here.student, here.teacher, here.batch)["kd"])
    assert {name for name, gradient in gradients.items() if gradient is not None} == {"z_s"}


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ACKDError, match=rf"temperature is {temperature} in KD; it must be above 0"):
        KD(temperature=temperature)


def test_it_needs_a_teacher_and_no_branches():
    assert KD.teacher == "logits"
    assert KD().branches == ()
