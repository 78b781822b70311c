from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import DIST
from ackd_lightning.methods.dist import dist_loss
from methods.helpers import check_finite, twenty_steps

DEFAULTS = {"beta": 1.0, "gamma": 1.0, "temperature": 4.0}


def logits(images: int = 6, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return tuple(3 * torch.randn(images, classes, generator=generator) for _ in range(2))


def slow(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> float:
    ours, theirs = ((each.double() / temperature).softmax(dim=1).numpy() for each in (student, teacher))
    images, classes = ours.shape
    inter = sum(1 - np.corrcoef(ours[i], theirs[i])[0, 1] for i in range(images)) / images
    intra = sum(1 - np.corrcoef(ours[:, j], theirs[:, j])[0, 1] for j in range(classes)) / classes
    return temperature**2 * (beta * inter + gamma * intra)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(1.0, 1.0, 4.0), (2.0, 0.0, 1.0), (0.0, 3.0, 2.0)])
def test_it_equals_a_slow_reference(beta, gamma, temperature):
    settings = {"beta": beta, "gamma": gamma, "temperature": temperature}
    assert dist_loss(*logits(), **settings).item() == pytest.approx(slow(*logits(), **settings), rel=1e-4)


def test_it_is_zero_at_equality():
    _, teacher = logits()
    assert dist_loss(teacher, teacher, **DEFAULTS).item() == pytest.approx(0.0, abs=1e-4)


def test_rows_ignore_a_shift_and_scale_of_the_probabilities():
    _, teacher = logits()
    probability = teacher.softmax(dim=1)
    flatter = (0.3 * probability + 0.7 / 7).log()  # 0.3 p + constant
    settings = {"beta": 1.0, "gamma": 1.0, "temperature": 1.0}
    assert dist_loss(flatter, teacher, **settings).item() == pytest.approx(0.0, abs=1e-4)


def test_columns_compare_the_images_of_a_batch():
    student, teacher = logits()
    settings = {"beta": 0.0, "gamma": 1.0, "temperature": 1.0}
    halves = [dist_loss(student[part], teacher[part], **settings).item() for part in (slice(3), slice(3, 6))]
    assert sum(halves) / 2 != pytest.approx(dist_loss(student, teacher, **settings).item(), rel=1e-2)


@pytest.mark.parametrize(
    ("student", "missing"),
    [
        (torch.zeros(6, 7), 2.0),  # a classifier that starts at zero: constant rows and columns
        (torch.arange(7.0).repeat(6, 1), 1.0),  # the same for all images: constant columns
    ],
)
def test_constant_rows_and_columns_count_as_uncorrelated_without_gradient(student, missing):
    _, teacher = logits()
    student = student.half().requires_grad_()
    settings = {"beta": 1.0, "gamma": 1.0, "temperature": 1.0}
    loss = dist_loss(student, teacher, **settings)
    loss.backward()
    rows = dist_loss(student.detach(), teacher, **{**settings, "gamma": 0.0}).item()
    assert loss.item() == pytest.approx(1.0 + rows, rel=1e-6)
    assert (rows == pytest.approx(1.0)) is (missing == 2.0)
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1.0
    assert bool(student.grad.any()) is (missing == 1.0)


def test_a_single_image_has_no_relation_within_classes():
    student, teacher = (each[:1] for each in logits())
    student.requires_grad_()
    loss = dist_loss(student, teacher, beta=0.0, gamma=1.0, temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(4.0)
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype, sign):
    student = torch.full((2, 5), -6e4, dtype=dtype)
    student[0, 1] = student[1, 3] = 6e4
    teacher = sign * student.clone()
    student.requires_grad_()
    loss = dist_loss(student, teacher, **DEFAULTS)
    check_finite(loss, student)
    assert loss > 1.0  # three columns of five say nothing


def test_twenty_steps_lower_it():
    student, teacher = logits()
    student.requires_grad_()
    losses = twenty_steps(lambda: dist_loss(student, teacher, **DEFAULTS), [student], lr=0.5)
    assert losses[-1] < 0.5 * losses[0]


def test_the_method_hands_its_arguments_to_the_loss_and_reaches_the_student_alone(scene):
    here = scene(1)
    terms = DIST(beta=2.0, gamma=0.5, temperature=3.0)(here.student, here.teacher, here.batch)
    assert terms["dist"].item() == pytest.approx(slow(here.z_s.detach(), here.z_t.detach(), 2.0, 0.5, 3.0), rel=1e-4)
    gradients = here.gradients(terms["dist"])
    assert {name for name, gradient in gradients.items() if gradient is not None} == {"z_s"}


def test_defaults_are_the_authors():
    method = DIST()
    assert {name: getattr(method, name) for name in DEFAULTS} == DEFAULTS
    assert method.loss_weights == {"ce": 1.0, "dist": 1.0}


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ACKDError, match=rf"temperature is {temperature} in DIST; it must be above 0"):
        DIST(temperature=temperature)
