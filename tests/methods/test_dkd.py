from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import kd_loss
from ackd_lightning.methods import DKD, dkd
from ackd_lightning.methods.base import FitInfo
from methods.helpers import check_finite, extreme, twenty_steps

DEFAULTS = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0}


def dkd_loss(*inputs: Tensor, **settings: float) -> Tensor:
    return dkd.dkd_loss(*inputs, **settings).mean()


def inputs(images: int = 6, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(images, classes, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(classes, (images,), generator=generator)


def slow(student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float, temperature: float) -> float:
    total = 0.0
    for z_s, z_t, y in zip(student.double(), teacher.double(), target.tolist(), strict=True):
        s, t = (z_s / temperature).softmax(dim=0).tolist(), (z_t / temperature).softmax(dim=0).tolist()

        def kl(p: list[float], q: list[float]) -> float:
            return sum(a * torch.tensor(a / b, dtype=torch.float64).log().item() for a, b in zip(p, q, strict=True))

        rest_s, rest_t = ([p / (1 - each[y]) for i, p in enumerate(each) if i != y] for each in (s, t))
        total += alpha * kl([t[y], 1 - t[y]], [s[y], 1 - s[y]]) + beta * kl(rest_t, rest_s)
    return total / len(target) * temperature**2


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (1.0, 0.0, 1.0), (0.0, 2.0, 1.5)])
def test_it_equals_a_slow_reference(alpha, beta, temperature):
    settings = {"alpha": alpha, "beta": beta, "temperature": temperature}
    assert dkd_loss(*inputs(), **settings).item() == pytest.approx(slow(*inputs(), **settings), rel=1e-5)


def test_the_loss_of_an_image_does_not_depend_on_the_others():
    student, teacher, target = inputs()
    losses = dkd.dkd_loss(student, teacher, target, **DEFAULTS)
    for number in range(len(target)):
        one = slice(number, number + 1)
        assert losses[number].item() == pytest.approx(
            slow(student[one], teacher[one], target[one], **DEFAULTS), rel=1e-5
        )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_weighted_by_the_teachers_rest_it_is_hintons_loss(temperature):
    student, teacher, target = inputs()
    values = []
    for number, label in enumerate(target):
        one = slice(number, number + 1)
        rest = 1 - (teacher[number] / temperature).softmax(dim=0)[label].item()
        values.append(
            dkd_loss(student[one], teacher[one], target[one], alpha=1.0, beta=rest, temperature=temperature).item()
        )
    mean = sum(values) / len(values)
    assert mean == pytest.approx(kd_loss(student, teacher, temperature=temperature).item(), rel=1e-5)


def test_it_is_zero_at_equality_and_shifts_of_logits_do_not_matter():
    student, teacher, target = inputs()
    assert dkd_loss(teacher, teacher, target, **DEFAULTS).item() == pytest.approx(0.0, abs=1e-6)
    shifted = dkd_loss(student + 5.0, teacher - 3.0, target, **DEFAULTS)
    assert shifted.item() == pytest.approx(dkd_loss(student, teacher, target, **DEFAULTS).item(), rel=1e-4)


def test_what_the_teacher_says_about_other_classes_survives_a_sure_teacher():
    student, teacher, target = inputs()
    sure = teacher.scatter_add(1, target[:, None], torch.full((len(target), 1), 300.0))
    settings = {"alpha": 0.0, "beta": 1.0, "temperature": 1.0}
    assert dkd_loss(student, sure, target, **settings) == dkd_loss(student, teacher, target, **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_value_and_gradient_are_finite_at_the_largest_logits(dtype, sign):
    student, teacher = extreme(dtype, images=2), extreme(dtype, sign=sign, images=2)
    target = torch.tensor([1, 0])
    loss = dkd_loss(student, teacher, target, **DEFAULTS)
    check_finite(loss, student)
    assert sign == 1 or loss > 1e4


def test_twenty_steps_lower_it():
    student, teacher, target = inputs()
    student.requires_grad_()
    losses = twenty_steps(lambda: dkd_loss(student, teacher, target, **DEFAULTS), [student], lr=0.5)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("warmup", "epoch", "weight"), [(20, 0, 0.1), (20, 9, 1.0), (20, 19, 2.0), (20, 99, 2.0), (0, 0, 2.0)]
)
def test_the_weight_grows_during_the_warm_up(warmup, epoch, weight):
    method = DKD(weight_dkd=2.0, warmup_epochs=warmup)
    method.set_epoch(epoch)
    assert method.loss_weights == {"ce": 1.0, "dkd": pytest.approx(weight)}


def test_the_method_hands_its_arguments_to_the_loss_and_reaches_the_student_alone(scene):
    here = scene(1)
    terms = DKD(alpha=0.5, beta=2.0, temperature=3.0)(here.student, here.teacher, here.batch)
    expected = slow(here.z_s.detach(), here.z_t.detach(), here.batch.target, 0.5, 2.0, 3.0)
    assert terms["dkd"].item() == pytest.approx(expected, rel=1e-5)
    gradients = here.gradients(terms["dkd"])
    assert {name for name, gradient in gradients.items() if gradient is not None} == {"z_s"}


def test_defaults_are_the_benchmarks():
    method = DKD()
    assert {name: getattr(method, name) for name in DEFAULTS} == DEFAULTS
    assert method.warmup_epochs == 20
    assert method.loss_weights == {"ce": 1.0, "dkd": 1.0}


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("temperature", -1.0), ("warmup_epochs", -1)])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ACKDError, match=rf"{name} is {value} in DKD; it must be"):
        DKD(**{name: value})


@pytest.mark.parametrize(("epochs", "said"), [(5, "25%"), (19, "95%"), (20, None), (None, None)])
def test_a_fit_that_is_shorter_than_the_warm_up_is_told(capsys, epochs, said):
    DKD().begin_fit(FitInfo(epochs=epochs))
    out = capsys.readouterr().out
    assert said in out if said else out == ""
