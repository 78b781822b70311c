from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import IAKD, FitInfo
from ackd_lightning.testing import Harness
from ackd_lightning.types import NetOutput
from methods.helpers import Stages, extreme


def harness_for(method: IAKD, widths: tuple[int, int, int]) -> Harness:
    torch.manual_seed(0)
    harness = Harness(method, student=Stages(), teacher=Stages(widths))
    harness.begin_fit(epoch=20)
    return harness


@pytest.mark.parametrize(("widths", "convolutions"), [((4, 8, 6), 0), ((4, 12, 10), 3), ((5, 8, 7), 2)])
def test_the_hybrid_network_equals_a_slow_reference(widths, convolutions):
    harness = harness_for(IAKD(probability=0.6, schedule="uniform"), widths)
    method, batch = harness.method, harness.data.batch()
    assert method.layers == ((1, 1), (2, 2))
    assert len(list(method.parameters())) == convolutions
    swaps = method.swaps(batch.index)
    assert {bool(each) for swap in swaps for each in swap.flatten()} == {True, False}
    student, teacher = harness.module.student.plain(), harness.module.teacher.network
    feature = student.stem(batch.image)
    for number, name in enumerate(("first", "second")):
        ours = getattr(student, name)(feature)
        theirs = method.leave[number](getattr(teacher, name)(method.enter[number](feature)))
        feature = torch.stack([theirs[b] if swaps[number][b] else ours[b] for b in range(len(batch.target))])
    expected = student.head(feature.mean(dim=(2, 3)))
    torch.testing.assert_close(method.hybrid(batch), expected)
    torch.testing.assert_close(harness.terms()["ce_hybrid"], F.cross_entropy(expected, batch.target))


def test_without_swaps_it_is_the_student_and_with_all_of_them_the_teacher_after_the_students_stem():
    harness = harness_for(IAKD(probability=0.0), (4, 8, 6))
    batch = harness.data.batch()
    student = harness.module.student.plain()
    torch.testing.assert_close(harness.method.hybrid(batch), student(batch.image))
    harness = harness_for(IAKD(probability=1.0, schedule="uniform"), (4, 8, 6))
    student, teacher = harness.module.student.plain(), harness.module.teacher.network
    expected = student.head(teacher.second(teacher.first(student.stem(batch.image))).mean(dim=(2, 3)))
    torch.testing.assert_close(harness.method.hybrid(batch), expected)


def test_gradients_reach_the_student_through_the_teacher_and_both_stay_as_they_were():
    harness = harness_for(IAKD(probability=1.0, schedule="uniform"), (4, 12, 10))
    before = [copy.deepcopy(each.state_dict()) for each in (harness.module.student, harness.module.teacher.network)]
    student = harness.module.student.plain()
    hooks = {name: len(module._forward_hooks) for name, module in student.named_modules()}
    output, _, batch = harness.outputs()
    statistics = copy.deepcopy(harness.module.student.state_dict())
    harness.method(output, None, batch)["ce_hybrid"].backward()
    assert student.stem[0].weight.grad.any()
    assert not student.first[0].weight.grad.any()
    assert student.head.weight.grad.any()
    assert all(parameter.grad is None for parameter in harness.module.teacher.network.parameters())
    for key, value in harness.module.student.state_dict().items():
        assert torch.equal(value, statistics[key]), key  # of the one pass in outputs
    for key, value in harness.module.teacher.network.state_dict().items():
        assert torch.equal(value, before[1][key]), key
    assert {name: len(module._forward_hooks) for name, module in student.named_modules()} == hooks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients_are_finite_at_the_largest_logits(dtype, monkeypatch):
    harness = harness_for(IAKD(weight_ce=1.0), (4, 8, 6))
    student, hybrid = extreme(dtype), extreme(dtype, sign=-1)
    monkeypatch.setattr(harness.method, "hybrid", lambda batch: hybrid)
    terms = harness.method(NetOutput(student), None, harness.data.batch())
    assert {each.dtype for each in terms.values()} == {torch.float32}
    sum(terms.values()).backward()
    for value in (*terms.values(), student.grad, hybrid.grad):
        assert value.isfinite().all()


def test_the_probability_falls_and_bits_depend_on_seed_epoch_and_image():
    harness = harness_for(IAKD(probability=0.8), (4, 8, 6))
    method = harness.method
    found = []
    for epoch in (0, 50, 99):
        method.set_epoch(epoch)
        found.append(method.current_probability)
    assert found == pytest.approx([0.8, 0.4, 0.008])
    method.set_epoch(25)
    index = torch.arange(4000)
    share = method.swaps(index)[0]
    assert share.float().mean().item() == pytest.approx(0.6, abs=0.03)
    assert torch.equal(method.swaps(index.flip(0))[0].flip(0), share)
    assert not torch.equal(method.swaps(index)[1], share)
    method.seed += 1
    assert not torch.equal(method.swaps(index)[0], share)


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [
        ("resnet8", "resnet14", ((1, 1), (2, 2), (3, 3))),
        ("resnet8", "wrn_16_2", ((1, 1), (2, 2), (3, 3))),
        ("mobilenetv2_x0_5", "resnet14", ((1, 1), (2, 2), (3, 3), (4, 3))),
        ("resnet8", "mobilenetv2_x0_5", ((1, 1), (2, 2), (3, 3))),
    ],
)
def test_stages_of_other_networks_are_swapped(student, teacher, layers):
    harness = Harness(IAKD(), student=student, teacher=teacher)
    assert harness.method.layers == layers
    assert harness.step().isfinite()


def test_the_loss_falls():
    losses = Harness(IAKD(schedule="uniform"), student="resnet8", teacher="resnet8", lr=0.05).train(steps=30)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_networks_that_do_not_go_together_and_lengths_that_are_unknown_are_refused():
    with pytest.raises(ACKDError, match="IAKD has one teacher"):
        Harness(IAKD(), teacher=["resnet8", "resnet14"])
    with pytest.raises(ACKDError, match="no stage of the student"):
        Harness(IAKD(), student=Stages(), teacher=Stages(stride=1))
    with pytest.raises(ACKDError, match="schedule is falling"):
        Harness(IAKD()).method.begin_fit(FitInfo(epochs=None))
