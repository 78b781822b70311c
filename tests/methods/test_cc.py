from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import CC, Networks
from ackd_lightning.methods.cc import cc_kernel_loss, cc_loss
from ackd_lightning.types import Batch, NetOutput, NetSpec
from methods.helpers import twenty_steps

both = pytest.mark.parametrize("loss", [cc_loss, cc_kernel_loss])


def embeddings(images: int = 6, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(images, width, generator=generator) for _ in range(2))


def built(**arguments) -> CC:
    torch.manual_seed(5)
    method = CC(**arguments)
    method.build(Networks(student=NetSpec(3, embedding=5), teachers=(NetSpec(3, embedding=7),)))
    return method


def outputs(images: int = 6) -> tuple[NetOutput, NetOutput, Batch]:
    generator = torch.Generator().manual_seed(6)
    networks = []
    for width in (5, 7):
        logits, pooled = (torch.randn(images, size, generator=generator).requires_grad_() for size in (3, width))
        networks.append(NetOutput(logits, None, pooled))
    return *networks, Batch(torch.zeros(images, 3, 2, 2), torch.zeros(images, dtype=torch.int64), torch.arange(images))


def test_neighbours_equal_a_slow_reference():
    student, teacher = embeddings()
    total = 0.0
    for i in range(5):
        for d in range(5):
            here, there = (abs(student[n, d].item() - teacher[n, d].item()) for n in (i, i + 1))
            total += here * there
    assert cc_loss(student, teacher).item() == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (1.0, 1), (0.3, 4)])
def test_the_kernel_equals_a_slow_reference(gamma, order):
    student, teacher = embeddings()

    def entry(side: Tensor, i: int, j: int) -> float:
        x, y = side[i].double(), side[j].double()
        cosine = (x @ y / (x.norm() * y.norm())).item()
        terms = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(terms)

    total = sum((entry(student, i, j) - entry(teacher, i, j)) ** 2 for i in range(6) for j in range(6))
    value = cc_kernel_loss(student, teacher, gamma=gamma, order=order).item()
    assert value == pytest.approx(total / 36, rel=1e-4)


def test_the_expansion_approaches_the_gaussian_kernel():
    student, teacher = embeddings()
    units = [each / each.norm(dim=1, keepdim=True) for each in (student, teacher)]
    exact = [torch.exp(-0.4 * torch.cdist(each, each).square()) for each in units]
    expected = (exact[0] - exact[1]).square().mean().item()
    assert cc_kernel_loss(student, teacher, gamma=0.4, order=12).item() == pytest.approx(expected, rel=1e-3)


@both
def test_it_is_zero_at_equality(loss):
    student, _ = embeddings()
    assert loss(student, student).item() == 0.0


def test_the_kernel_ignores_order_rotation_and_length_and_neighbours_do_not_ignore_order():
    student, teacher = embeddings()
    order = torch.tensor([2, 0, 5, 1, 4, 3])
    rotation = torch.linalg.qr(embeddings()[0][:5]).Q
    expected = cc_kernel_loss(student, teacher).item()
    for other in (cc_kernel_loss(student[order], teacher[order]), cc_kernel_loss(3 * student @ rotation, teacher)):
        assert other.item() == pytest.approx(expected, rel=1e-4)
    shuffled = cc_loss(student[order], teacher[order]).item()
    assert shuffled != pytest.approx(cc_loss(student, teacher).item(), rel=1e-2)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_for_the_largest_embeddings(loss, dtype):
    student = torch.full((3, 8), 6e4, dtype=dtype)
    student[1] = -6e4
    teacher = -student
    value = loss(student, teacher)
    exact = student.float().requires_grad_()  # neighbours' gradient is as large as the difference, 1.2e5: not in half
    (gradient,) = torch.autograd.grad(loss(exact, teacher), exact)
    assert value.dtype is torch.float32
    assert value.isfinite()
    assert gradient.isfinite().all()


@both
def test_one_image_has_no_neighbour(loss):
    student, teacher = (each[:1].requires_grad_() for each in embeddings())
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert student.grad.isfinite().all()


@both
def test_twenty_steps_lower_it(loss):
    student, teacher = embeddings()
    student.requires_grad_()
    losses = twenty_steps(lambda: loss(student, teacher), [student], lr=0.1 if loss is cc_loss else 20.0)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kernel", ["consecutive", "rbf"])
def test_it_reaches_the_student_and_both_embeddings_but_not_the_teacher(kernel):
    method = built(kernel=kernel)
    student, teacher, batch = outputs()
    terms = method(student, teacher, batch)
    ours, theirs = method.embed_learner(student.embedding), method.embed_source(teacher.embedding)
    expected = cc_loss(ours, theirs) if kernel == "consecutive" else cc_kernel_loss(ours, theirs, gamma=0.4, order=2)
    assert terms["cc"].item() == pytest.approx(expected.item(), rel=1e-6)
    terms["cc"].backward()
    assert student.embedding.grad.abs().sum() > 0
    assert all(each.grad.abs().sum() > 0 for name, each in method.named_parameters() if name.endswith("weight"))
    assert teacher.embedding.grad is None
    assert student.logits.grad is None


def test_defaults_are_the_benchmarks():
    method = built()
    assert method.loss_weights == {"ce": 1.0, "cc": 0.02}
    assert [tuple(each.shape) for each in method.parameters()] == [(128, 5), (128,), (128, 7), (128,)]


@pytest.mark.parametrize(
    ("name", "value"), [("kernel", "cubic"), ("embedding_size", 0), ("order", 0), ("gamma", 0.0), ("gamma", -1.0)]
)
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(ACKDError, match=rf"{name} is '?{value}'? in CC; it must be"):
        CC(**{name: value})


def test_a_network_without_pooled_features_is_refused():
    with pytest.raises(ACKDError, match=r"the teacher.*method CC"):
        CC().build(Networks(student=NetSpec(3, embedding=5), teachers=(NetSpec(3),)))
