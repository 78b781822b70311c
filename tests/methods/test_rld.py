from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import RLD, FitInfo
from ackd_lightning.methods.rld import rld_loss
from methods.helpers import check_finite, extreme, twenty_steps

DEFAULTS = {"alpha": 1.0, "beta": 8.0, "confidence_temperature": 1.0, "temperature": 4.0}


def inputs(images: int = 12, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    student, teacher = (3 * torch.randn(images, classes, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(classes, (images,), generator=generator)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    confidence_temperature: float,
    temperature: float,
) -> list[float]:
    losses = []
    for z_s, z_t, y in zip(student.tolist(), teacher.tolist(), target.tolist(), strict=True):

        def softmax(row: list[float], tau: float) -> list[float]:
            powers = [math.exp(each / tau) for each in row]
            return [each / sum(powers) for each in powers]

        s, t = softmax(z_s, confidence_temperature)[y], max(softmax(z_t, confidence_temperature))
        loss = alpha * confidence_temperature**2 * kl([t, 1 - t], [s, 1 - s])
        kept = [i for i in range(len(z_t)) if z_t[i] < z_t[y]]
        if kept:
            ours, theirs = ([row[i] for i in kept] for row in (z_s, z_t))
            loss += beta * temperature**2 * kl(softmax(theirs, temperature), softmax(ours, temperature))
        losses.append(loss)
    return losses


@pytest.mark.parametrize(
    "settings",
    [
        DEFAULTS,
        {**DEFAULTS, "beta": 0.0, "confidence_temperature": 2.0},
        {**DEFAULTS, "alpha": 0.0, "temperature": 1.5},
    ],
)
def test_it_equals_a_slow_reference(settings):
    found = rld_loss(*inputs(), **settings)
    assert found.tolist() == pytest.approx(slow(*inputs(), **settings), rel=1e-3, abs=1e-5)


def test_it_is_zero_for_a_teacher_that_is_right_and_a_student_that_equals_it():
    _, teacher, _ = inputs()
    assert rld_loss(teacher, teacher, teacher.argmax(dim=1), **DEFAULTS).abs().max() < 1e-5


def test_shifts_of_logits_do_not_matter():
    student, teacher, target = inputs()
    shifted = rld_loss(student + 5.0, teacher - 3.0, target, **DEFAULTS)
    torch.testing.assert_close(shifted, rld_loss(student, teacher, target, **DEFAULTS), rtol=1e-4, atol=1e-4)


def test_what_the_teacher_says_about_classes_that_it_prefers_to_the_target_does_not_matter():
    student, teacher, target = inputs()
    own = teacher.gather(1, target[:, None])
    preferred = teacher > own
    other = torch.where(preferred, own + (teacher - own) * 1.7, teacher)
    settings = {**DEFAULTS, "alpha": 0.0}
    assert preferred.any()
    torch.testing.assert_close(
        rld_loss(student, other, target, **settings), rld_loss(student, teacher, target, **settings)
    )


@pytest.mark.parametrize("classes", [2, 7])
def test_a_teacher_that_finds_the_target_least_likely_has_no_correlation(classes):
    student, teacher, _ = inputs(classes=classes)
    student.requires_grad_()
    loss = rld_loss(student, teacher, teacher.argmin(dim=1), **{**DEFAULTS, "alpha": 0.0}).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype, sign):
    student, teacher = extreme(dtype, images=2), extreme(dtype, sign=sign, images=2)
    target = torch.tensor([1, 0])
    loss = rld_loss(student, teacher, target, **DEFAULTS).mean()
    check_finite(loss, student)


def test_steps_lower_it():
    student, teacher, target = inputs()
    student.requires_grad_()
    losses = twenty_steps(lambda: rld_loss(student, teacher, target, **DEFAULTS).mean(), [student], lr=0.5)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("warmup", "epoch", "weight"), [(20, 0, 0.1), (20, 19, 2.0), (20, 99, 2.0), (0, 0, 2.0)])
def test_the_weight_grows_during_the_warm_up(warmup, epoch, weight):
    method = RLD(weight_rld=2.0, warmup_epochs=warmup)
    method.set_epoch(epoch)
    assert method.loss_weights == {"ce": 1.0, "rld": pytest.approx(weight)}


def test_a_fit_that_is_shorter_than_the_warm_up_is_told(capsys):
    RLD().begin_fit(FitInfo(epochs=5))
    assert "25%" in capsys.readouterr().out


def test_the_method_hands_its_arguments_to_the_loss_and_reaches_the_student_alone(scene):
    here, settings = scene(1), {"alpha": 0.5, "beta": 2.0, "confidence_temperature": 1.5, "temperature": 3.0}
    terms = RLD(**settings)(here.student, here.teacher, here.batch)
    expected = slow(here.z_s.detach(), here.z_t.detach(), here.batch.target, **settings)
    assert terms["rld"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    gradients = here.gradients(terms["rld"])
    assert {name for name, gradient in gradients.items() if gradient is not None} == {"z_s"}


def test_defaults_are_the_authors():
    method = RLD()
    assert {name: getattr(method, name) for name in DEFAULTS} == DEFAULTS
    assert method.warmup_epochs == 20
    assert method.loss_weights == {"ce": 1.0, "rld": 1.0}


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.0), ("confidence_temperature", -1.0), ("beta", -1.0), ("warmup_epochs", -1)]
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ACKDError, match=rf"{name} is {value} in RLD; it must be"):
        RLD(**{name: value})
