from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import NKD
from ackd_lightning.methods.nkd import nkd_loss
from methods.helpers import check_finite, extreme, twenty_steps

DEFAULTS = {"gamma": 1.5, "temperature": 1.0}


def inputs(images: int = 6, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    student, teacher = (3 * torch.randn(images, classes, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(classes, (images,), generator=generator)


def probabilities(row: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(each / temperature) for each in row]
    return [each / sum(powers) for each in powers]


def slow(student: Tensor, teacher: Tensor, target: Tensor, gamma: float, temperature: float) -> list[float]:
    losses = []
    for z_s, z_t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):
        loss = -probabilities(z_t)[y] * math.log(probabilities(z_s)[y])
        s, t = (
            [p / (1 - each[y]) for i, p in enumerate(each) if i != y]
            for each in (probabilities(z_s, temperature), probabilities(z_t, temperature))
        )
        losses.append(loss - gamma * temperature**2 * sum(a * math.log(b) for a, b in zip(t, s, strict=True)))
    return losses


@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (1.0, 2.0), (0.0, 3.0)])
def test_it_equals_a_slow_reference(gamma, temperature):
    found = nkd_loss(*inputs(), gamma=gamma, temperature=temperature)
    assert found.tolist() == pytest.approx(slow(*inputs(), gamma, temperature), rel=1e-4)


def test_shifts_of_logits_do_not_matter():
    student, teacher, target = inputs()
    shifted = nkd_loss(student + 5.0, teacher - 3.0, target, **DEFAULTS)
    torch.testing.assert_close(shifted, nkd_loss(student, teacher, target, **DEFAULTS), rtol=1e-4, atol=1e-4)


def test_the_other_classes_are_best_at_equality():
    """The target part alone is lowest for a student that is sure."""
    _, teacher, target = inputs()
    student = teacher.clone().requires_grad_()
    nkd_loss(student, teacher, target, **DEFAULTS).sum().backward()
    rest = student.grad.scatter(1, target[:, None], 0.0)
    own = student.softmax(dim=1) * teacher.softmax(dim=1).gather(1, target[:, None])  # of the target part
    torch.testing.assert_close(rest, own.detach().scatter(1, target[:, None], 0.0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype, sign):
    student, teacher = extreme(dtype, images=2), extreme(dtype, sign=sign, images=2)
    target = torch.tensor([1, 0])
    loss = nkd_loss(student, teacher, target, **DEFAULTS).mean()
    check_finite(loss, student)


def test_steps_lower_it():
    student, teacher, target = inputs()
    student.requires_grad_()
    losses = twenty_steps(lambda: nkd_loss(student, teacher, target, **DEFAULTS).mean(), [student], lr=0.5)
    assert losses[-1] < losses[0]


def test_the_method_hands_its_arguments_to_the_loss_and_reaches_the_student_alone(scene):
    here = scene(1)
    terms = NKD(gamma=0.5, temperature=2.0)(here.student, here.teacher, here.batch)
    expected = slow(here.z_s.detach(), here.z_t.detach(), here.batch.target, 0.5, 2.0)
    assert terms["nkd"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    gradients = here.gradients(terms["nkd"])
    assert {name for name, gradient in gradients.items() if gradient is not None} == {"z_s"}


def test_defaults_are_the_authors():
    method = NKD()
    assert {name: getattr(method, name) for name in DEFAULTS} == DEFAULTS
    assert method.loss_weights == {"ce": 1.0, "nkd": 1.0}


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("gamma", -1.0)])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ACKDError, match=rf"{name} is {value} in NKD; it must be"):
        NKD(**{name: value})
