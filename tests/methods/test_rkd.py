from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import RKD, Networks
from ackd_lightning.methods.rkd import rkd_loss
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import check_finite, twenty_steps

WEIGHTS = {"distance_weight": 25.0, "angle_weight": 50.0}


def embeddings(images: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(images, width, generator=generator) for width in (4, 6))


def slow(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    def huber(difference: float) -> float:
        return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5

    count = len(student)
    sides = []
    for side in (student.double(), teacher.double()):
        distance = [[(side[i] - side[j]).norm().item() for j in range(count)] for i in range(count)]
        positive = [each for row in distance for each in row if each > 0]
        mean = sum(positive) / len(positive)

        def unit(i: int, j: int, side: Tensor = side) -> Tensor:
            return torch.nn.functional.normalize(side[j] - side[i], dim=0)

        angle = [unit(i, j).dot(unit(i, k)).item() for i in range(count) for j in range(count) for k in range(count)]
        sides.append(([each / mean for row in distance for each in row], angle))
    return tuple(
        sum(huber(s - t) for s, t in zip(ours, theirs, strict=True)) / len(ours)
        for ours, theirs in zip(*sides, strict=True)
    )


@pytest.mark.parametrize("copies", [False, True])
def test_it_equals_a_slow_reference(copies):
    student, teacher = embeddings()
    student = 4 * student.abs()
    if copies:
        student[3] = student[1]
        teacher[0] = teacher[4]
    distance, angle = slow(student, teacher)
    assert distance > 0
    for by_distance, by_angle in ((1.0, 0.0), (0.0, 1.0), (25.0, 50.0)):
        value = rkd_loss(student, teacher, distance_weight=by_distance, angle_weight=by_angle).item()
        assert value == pytest.approx(by_distance * distance + by_angle * angle, rel=1e-4)


def test_relations_ignore_shift_rotation_scale_and_order():
    student, teacher = embeddings()
    rotation = torch.linalg.qr(embeddings()[0][:4]).Q
    expected = rkd_loss(student, teacher, **WEIGHTS).item()
    order = torch.tensor([3, 0, 4, 1, 2])
    for ours, theirs in (
        (student + 2.0, teacher - 1.0),
        (student @ rotation, teacher),
        (5 * student, 0.1 * teacher),
        (student[order], teacher[order]),
    ):
        assert rkd_loss(ours, theirs, **WEIGHTS).item() == pytest.approx(expected, rel=1e-4)
    assert rkd_loss(3 * teacher + 1, teacher, **WEIGHTS).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("same", [[0, 1], [0, 1, 2, 3, 4]])
def test_gradient_is_finite_and_of_normal_size_when_embeddings_are_equal(same):
    student, teacher = embeddings()
    student[same] = student[0].clone()
    student.requires_grad_()
    loss = rkd_loss(student, teacher, **WEIGHTS)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 100


def test_equal_teacher_embeddings_and_a_single_image_are_finite():
    student, teacher = embeddings()
    student.requires_grad_()
    for value in (
        rkd_loss(student, torch.ones_like(teacher), **WEIGHTS),
        rkd_loss(student[:1], teacher[:1], **WEIGHTS),
    ):
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_for_the_largest_embeddings(dtype):
    student = torch.full((3, 512), -6e4, dtype=dtype)
    student[1] = 6e4
    student[2, ::2] = 6e4
    teacher = torch.zeros(3, 512, dtype=dtype)
    teacher[0], teacher[2, 0] = 6e4, -6e4
    student.requires_grad_()
    loss = rkd_loss(student, teacher, **WEIGHTS)
    check_finite(loss, student)
    assert loss > 0


def test_half_precision_of_autocast_does_not_reach_the_angles():
    student, teacher = embeddings()
    expected = rkd_loss(student, teacher, **WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rkd_loss(student, teacher, **WEIGHTS), expected)


def test_twenty_steps_lower_it():
    student, teacher = embeddings()
    student.requires_grad_()
    losses = twenty_steps(lambda: rkd_loss(student, teacher, **WEIGHTS), [student], lr=0.05)
    assert losses[-1] < 0.5 * losses[0]


def test_the_method_hands_on_its_weights_and_reaches_the_students_embedding_alone():
    student, teacher = (each.requires_grad_() for each in embeddings())
    logits = torch.randn(5, 3).requires_grad_()
    batch = Batch(torch.zeros(5, 3, 2, 2), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    method = RKD(distance_weight=2.0, angle_weight=3.0)
    terms = method(NetOutput(logits, None, student), NetOutput(logits.detach(), None, teacher), batch)
    assert set(terms) == set(method.loss_weights)
    distance, angle = slow(student.detach(), teacher.detach())
    assert terms["rkd"].item() == pytest.approx(2 * distance + 3 * angle, rel=1e-4)
    terms["rkd"].backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert logits.grad is None


def test_defaults_are_the_benchmarks():
    method = RKD()
    assert (method.distance_weight, method.angle_weight) == (25.0, 50.0)
    assert method.loss_weights == {"ce": 1.0, "rkd": 1.0}


@pytest.mark.parametrize("name", ["distance_weight", "angle_weight"])
def test_a_negative_weight_is_refused(name):
    with pytest.raises(ACKDError, match=rf"{name} is -1.0 in RKD; it must be at least 0"):
        RKD(**{name: -1.0})


@pytest.mark.parametrize(("role", "widths"), [("student", (None, 4)), ("teacher", (4, None))])
def test_a_network_without_pooled_features_is_refused(role, widths):
    student, teacher = (NetSpec(3, embedding=width) for width in widths)
    with pytest.raises(ACKDError, match=rf"the {role}.*method RKD"):
        RKD().build(Networks(student=student, teachers=(teacher,)))
