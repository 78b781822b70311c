from __future__ import annotations

import pytest
import torch

from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import entropy_weights, standardized
from ackd_lightning.methods import DGKD, FitInfo
from ackd_lightning.methods.description import from_description
from ackd_lightning.testing import Harness
from ackd_lightning.types import NetOutput
from methods.helpers import check_finite, extreme, slow_divergence

THREE = ("resnet20", "resnet14", "resnet8")


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_it_is_the_sum_over_the_guides_that_are_kept(dropped):
    harness = Harness(DGKD(dropped=dropped, temperature=3.0), student="resnet8", teacher=THREE)
    student, _, batch = harness.outputs()
    every = [slow_divergence(each, student.logits, 3.0) for each in harness.method.guide_logits(batch)]
    for _ in range(5):
        kept = harness.method.kept(3).tolist()
        assert sorted(kept) == [0.0] * dropped + [1.0] * (3 - dropped)
        found = harness.method(student, None, batch)["kd"].item()
        assert found == pytest.approx(sum(k * each for k, each in zip(kept, every, strict=True)), rel=1e-4)
        harness.method.update(student, None, batch)


def test_every_guide_is_dropped_equally_often_and_which_one_depends_on_seed_and_step():
    draws = {}
    for seed in (0, 1):
        method = DGKD()
        method.begin_fit(FitInfo(seed=seed))
        draws[seed] = []
        for _ in range(300):
            draws[seed].append(method.kept(3))
            method.update(None, None, None)
        counts = torch.stack(draws[seed]).sum(dim=0) / 300
        assert counts.tolist() == pytest.approx([2 / 3] * 3, abs=0.1)
    assert not torch.equal(torch.stack(draws[0]), torch.stack(draws[1]))
    again = DGKD()
    again.begin_fit(FitInfo(seed=1))
    again.load_state_dict({"steps": torch.tensor(17)})
    assert torch.equal(again.kept(3), draws[1][17])


def test_it_is_zero_for_a_student_that_equals_its_guides():
    harness = Harness(DGKD(), teacher=THREE)
    _, _, batch = harness.outputs()
    harness.method.keep_outside("guides", harness.method.guides[:1] * 2)
    (same, _) = harness.method.guide_logits(batch)
    assert harness.method(NetOutput(same + 2.0), None, batch)["kd"].item() == pytest.approx(0.0, abs=1e-5)


def test_standardised_logits_and_weights_of_images_are_those_of_all_logit_methods():
    harness = Harness(DGKD(dropped=0, standardize=True, entropy_temperature=2.0), teacher=THREE)
    student, _, batch = harness.outputs()
    ours, total = standardized(student.logits.detach()), 0.0
    for logits in harness.method.guide_logits(batch):
        theirs = standardized(logits)
        losses = [slow_divergence(t[None], s[None], 5.0) for s, t in zip(ours, theirs, strict=True)]
        weights = entropy_weights(ours, theirs, temperature=2.0).tolist()
        total += sum(w * each for w, each in zip(weights, losses, strict=True)) / len(losses)
    assert harness.method(student, None, batch)["kd"].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype, monkeypatch):
    harness = Harness(DGKD(), teacher=THREE)
    _, _, batch = harness.outputs()
    logits = extreme(torch.float32).detach()
    monkeypatch.setattr(harness.method, "guide_logits", lambda batch: [logits, logits.flip(1), -logits])
    student = extreme(dtype)
    loss = harness.method(NetOutput(student), None, batch)["kd"]
    check_finite(loss, student)


def test_training_lowers_it():
    harness = Harness(DGKD(), teacher=THREE, lr=0.02)
    before = harness.terms()["kd"]
    harness.train(steps=20)
    assert harness.method.steps == 20
    assert harness.terms()["kd"] < before


def test_the_fragment_has_the_values_of_the_authors_program():
    method = from_description(read_config(config_folder() / "methods" / "dgkd.yaml")["model"]["method"])
    assert (method.temperature, method.dropped, method.loss_weights) == (5.0, 1, {"ce": 0.0, "kd": 1.0})


@pytest.mark.parametrize("teacher", ["resnet14", ("resnet14",)])
def test_a_teacher_without_assistants_is_refused(teacher):
    with pytest.raises(ACKDError, match="DGKD"):
        Harness(DGKD(), teacher=teacher)


def test_a_guide_must_be_left():
    with pytest.raises(ACKDError, match="dropped is 2"):
        Harness(DGKD(dropped=2), teacher=THREE[:2])


def test_a_guide_whose_features_alone_are_used_is_refused():
    harness = Harness(DGKD(), teacher=THREE)
    harness.module.teachers.frozen[1].features_only = True
    with pytest.raises(ACKDError, match="class_map"):
        harness.begin_fit()


def test_a_step_before_the_fit_is_refused():
    harness = Harness(DGKD())
    harness._begun = True
    with pytest.raises(ACKDError, match="begin_fit"):
        harness.terms()
