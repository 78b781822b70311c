from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import entropy_weights, standardized
from ackd_lightning.methods import CESKD, FitInfo
from ackd_lightning.methods.ceskd import choose_experts
from ackd_lightning.testing import Harness
from ackd_lightning.types import NetOutput
from methods.helpers import check_finite, extreme, slow_divergences, twenty_steps

THREE = ("resnet20", "resnet14", "resnet8")


def slow_experts(difficulty: list[float], experts: int, share: float) -> list[int]:
    """Rank by rank: the smallest expert has the highest number."""
    found = []
    for each in difficulty:
        easier = len([other for other in difficulty if other < each])
        found.append(experts - 1 - min(math.floor(share * experts * easier / len(difficulty)), experts - 1))
    return found


def slow_cross_entropy(row: list[float], target: int) -> float:
    return math.log(sum(math.exp(each) for each in row)) - row[target]


@pytest.mark.parametrize(("experts", "share"), [(2, 1.0), (3, 1 / 3), (3, 0.6), (3, 1.0), (4, 0.8)])
def test_experts_are_chosen_as_by_a_slow_reference(experts, share):
    difficulty = torch.rand(24, generator=torch.Generator().manual_seed(2))
    assert choose_experts(difficulty, experts, share).tolist() == slow_experts(difficulty.tolist(), experts, share)


def test_the_smallest_expert_teaches_all_at_first_and_each_a_third_in_the_end():
    difficulty = torch.rand(12)
    assert choose_experts(difficulty, 3, 1 / 3).tolist() == [2] * 12
    chosen = choose_experts(difficulty, 3, 1.0)
    assert chosen.bincount().tolist() == [4, 4, 4]
    assert difficulty[chosen == 0].min() > difficulty[chosen == 1].max()
    assert difficulty[chosen == 1].min() > difficulty[chosen == 2].max()
    assert choose_experts(torch.ones(6), 3, 1.0).tolist() == [2] * 6  # equally easy


@pytest.mark.parametrize(("epoch", "share"), [(0, 1 / 3), (10, 2 / 3), (20, 1.0), (70, 1.0)])
def test_every_image_learns_from_its_own_expert(epoch, share):
    harness = Harness(CESKD(curriculum_epochs=20, temperature=2.0), teacher=THREE)
    harness.begin_fit(epoch=epoch)
    student, _, batch = harness.outputs()
    guides = [each.double().tolist() for each in harness.method.guide_logits(batch)]
    difficulty = [
        sum(slow_cross_entropy(guide[image], int(target)) for guide in guides) / 3
        for image, target in enumerate(batch.target)
    ]
    total = 0.0
    for image, expert in enumerate(slow_experts(difficulty, 3, share)):
        logits = torch.tensor(guides[expert][image])[None]
        total += slow_divergences(logits, student.logits[image : image + 1], 2.0)[0]
    assert harness.method(student, None, batch)["kd"].item() == pytest.approx(total / 8, rel=1e-4)


def test_standardised_logits_and_weights_of_images_are_those_of_all_logit_methods():
    method = CESKD(curriculum_epochs=0, standardize=True, entropy_temperature=2.0)
    harness = Harness(method, teacher=THREE)
    student, _, batch = harness.outputs()
    guides = method.guide_logits(batch)
    difficulty = torch.stack([F.cross_entropy(each, batch.target, reduction="none") for each in guides]).mean(dim=0)
    chosen = slow_experts(difficulty.tolist(), 3, 1.0)  # by the logits as they are
    ours = standardized(student.logits.detach())
    theirs = standardized(torch.stack([guides[expert][image] for image, expert in enumerate(chosen)]))
    losses = slow_divergences(theirs, ours, 4.0)
    weights = entropy_weights(ours, theirs, temperature=2.0).tolist()
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / len(losses)
    assert method(student, None, batch)["kd"].item() == pytest.approx(expected, rel=1e-4)


def test_the_curriculum_takes_half_of_the_training_unless_told_otherwise(capsys):
    method = CESKD()
    method.begin_fit(FitInfo(epochs=31))
    assert method.curriculum_epochs == 15
    with pytest.raises(ACKDError, match="curriculum_epochs"):
        CESKD().begin_fit(FitInfo())
    short = CESKD(curriculum_epochs=40)
    short.begin_fit(FitInfo(epochs=31))
    assert short.curriculum_epochs == 40
    assert "curriculum_epochs" in "".join(capsys.readouterr())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype, monkeypatch):
    harness = Harness(CESKD(curriculum_epochs=0))
    _, _, batch = harness.outputs()
    logits = extreme(torch.float32).detach()
    monkeypatch.setattr(harness.method, "guide_logits", lambda batch: [logits, logits.flip(1)])
    student = extreme(dtype)
    loss = harness.method(NetOutput(student), None, batch)["kd"]
    check_finite(loss, student)


def test_steps_lower_it(monkeypatch):
    harness = Harness(CESKD(curriculum_epochs=0))
    _, _, batch = harness.outputs()
    guides = [3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    monkeypatch.setattr(harness.method, "guide_logits", lambda batch: guides)
    student = torch.zeros(8, 5, requires_grad=True)
    losses = twenty_steps(lambda: harness.method(NetOutput(student), None, batch)["kd"], [student], lr=1.0)
    assert losses[-1] < 0.5 * losses[0]


def test_experts_from_the_smallest_to_the_largest_are_refused():
    with pytest.raises(ACKDError, match=r"resnet8 with [\d,]+ parameters before resnet14 .* CESKD"):
        Harness(CESKD(), teacher=("resnet8", "resnet14"))
    Harness(CESKD(), teacher=("resnet8", "resnet8"))


def test_a_teacher_without_assistants_is_refused():
    with pytest.raises(ACKDError, match="CESKD"):
        Harness(CESKD(), teacher="resnet14")
