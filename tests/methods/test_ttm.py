from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import kl_divergence
from ackd_lightning.methods import TTM
from ackd_lightning.methods.description import from_description
from ackd_lightning.methods.ttm import ttm_loss
from methods.helpers import check_finite, extreme, twenty_steps


def inputs(images: int = 6, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(3 * torch.randn(images, classes, generator=generator) for _ in range(2))


def probabilities(row: list[float]) -> list[float]:
    powers = [math.exp(each) for each in row]
    return [each / sum(powers) for each in powers]


def slow(student: Tensor, teacher: Tensor, temperature: float, weighted: bool) -> list[float]:
    """Powers of the teacher's probabilities, as the authors compute them."""
    losses = []
    for z_s, z_t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, powers = probabilities(z_s), [p ** (1 / temperature) for p in probabilities(z_t)]
        total = sum(powers)
        loss = sum(p / total * math.log(p / total / each) for p, each in zip(powers, q, strict=True))
        losses.append(loss * total if weighted else loss)
    return losses


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 5.0, 10.0])
def test_it_equals_a_slow_reference(temperature, weighted):
    found = ttm_loss(*inputs(), temperature=temperature, weighted=weighted)
    assert found.tolist() == pytest.approx(slow(*inputs(), temperature, weighted), rel=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_at_temperature_one_it_is_hintons_loss(weighted):
    found = ttm_loss(*inputs(), temperature=1.0, weighted=weighted).mean()
    assert found.item() == pytest.approx(kl_divergence(*inputs(), temperature=1.0).item(), rel=1e-5)


def test_it_is_zero_for_a_student_with_the_softened_logits_and_ignores_shifts():
    student, teacher = inputs()
    assert ttm_loss(teacher / 4, teacher, temperature=4.0, weighted=True).abs().max() < 1e-5
    shifted = ttm_loss(student + 5.0, teacher - 3.0, temperature=4.0, weighted=True)
    torch.testing.assert_close(shifted, ttm_loss(student, teacher, temperature=4.0, weighted=True))


def test_an_unsure_teacher_weighs_more():
    even, sure = torch.zeros(1, 7), torch.tensor([[90.0] + [0.0] * 6])
    student = inputs()[0][:1]
    ratios = [
        float(ttm_loss(student, each, temperature=2.0, weighted=True))
        / float(ttm_loss(student, each, temperature=2.0, weighted=False))
        for each in (even, sure)
    ]
    assert ratios == [pytest.approx(7**0.5, rel=1e-4), pytest.approx(1.0, rel=1e-4)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype, sign, weighted):
    student, teacher = extreme(dtype, images=2), extreme(dtype, sign=sign, images=2)
    loss = ttm_loss(student, teacher, temperature=4.0, weighted=weighted).mean()
    check_finite(loss, student)


def test_steps_lower_it():
    student, teacher = inputs()
    student.requires_grad_()
    losses = twenty_steps(lambda: ttm_loss(student, teacher, temperature=4.0, weighted=True).mean(), [student], lr=1.0)
    assert losses[-1] < 0.5 * losses[0]


def test_the_method_hands_its_arguments_to_the_loss_and_reaches_the_student_alone(scene):
    here = scene(1)
    terms = TTM(temperature=3.0, weighted=True)(here.student, here.teacher, here.batch)
    expected = slow(here.z_s.detach(), here.z_t.detach(), 3.0, True)
    assert terms["ttm"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    gradients = here.gradients(terms["ttm"])
    assert {name for name, gradient in gradients.items() if gradient is not None} == {"z_s"}


@pytest.mark.parametrize(
    ("name", "values"),
    [("ttm", (10.0, False, {"ce": 1.0, "ttm": 45.0})), ("wttm", (5.0, True, {"ce": 1.0, "ttm": 4.0}))],
)
def test_the_fragments_have_the_authors_examples(name, values):
    method = from_description(read_config(config_folder() / "methods" / f"{name}.yaml")["model"]["method"])
    assert (method.temperature, method.weighted, method.loss_weights) == values


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(value):
    with pytest.raises(ACKDError, match=rf"temperature is {value} in TTM; it must be above 0"):
        TTM(temperature=value)
