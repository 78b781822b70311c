from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import InfoFlow
from ackd_lightning.methods.infoflow import infoflow_loss, log_similarities
from ackd_lightning.testing import Harness
from ackd_lightning.types import NetOutput
from methods.helpers import check_finite, twenty_steps


def features(images: int = 5, ours: int = 3, theirs: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(images, ours, generator=generator), 2 * torch.randn(images, theirs, generator=generator) + 1


def slow(student: Tensor, teacher: Tensor) -> float:
    def cosine(a: list[float], b: list[float]) -> float:
        return (sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) + 1) / 2

    def student_t(a: list[float], b: list[float]) -> float:
        return 1 / (1 + math.sqrt(math.dist(a, b) ** 2 + 1e-6))

    total, images = 0.0, len(student)
    for kernel in (cosine, student_t):
        for i in range(images):
            rows = []
            for each in (student.tolist(), teacher.tolist()):
                similar = [kernel(each[i], other) for other in each]
                rows.append([value / sum(similar) for value in similar])
            total += sum((t - s) * math.log(t / s) for s, t in zip(*rows, strict=True)) / images
    return total


def test_it_equals_a_slow_reference():
    assert infoflow_loss(*features()).item() == pytest.approx(slow(*features()), rel=1e-4)


def test_it_is_zero_at_equality_and_ignores_rotations():
    student, teacher = features(theirs=3)
    assert infoflow_loss(teacher, teacher).item() == 0.0
    rotation = torch.linalg.qr(torch.randn(3, 3))[0]
    torch.testing.assert_close(infoflow_loss(student @ rotation, teacher), infoflow_loss(student, teacher))


def test_the_gradient_is_that_of_the_differences_and_needs_no_backward_pass_of_cdist():
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    def loss_of_differences(flat: Tensor) -> Tensor:
        unit = flat / (flat.norm(dim=1, keepdim=True) + 1e-6)
        squared = (flat[:, None] - flat[None]).square().sum(dim=2)
        own = [((unit @ unit.T + 1) / 2), 1 / (1 + (squared + 1e-6).sqrt())]
        total = 0.0
        for ours, theirs in zip(own, log_similarities(teacher.double()), strict=True):
            s, t = (ours / ours.sum(dim=1, keepdim=True)).log(), theirs.double()
            total = total + ((t.exp() - s.exp()) * (t - s)).sum(dim=1).mean()
        return total

    student, teacher = features(images=8, ours=300)
    student = 5 * student + 100  # a common offset, and two pairs that are equal and nearly equal
    student[1], student[3] = student[0], student[2] + 1e-3
    names: list[str] = []
    found = student.clone().requires_grad_()
    with Calls():
        infoflow_loss(found, teacher).backward()
    assert not any("cdist_backward" in name for name in names)
    exact = student.double().requires_grad_()
    loss_of_differences(exact).backward()
    error = (found.grad - exact.grad).norm() / exact.grad.norm()
    assert error < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_opposite_equal_and_zero_features(dtype):
    student = torch.tensor([[6e4, 0.0], [-6e4, 0.0], [6e4, 0.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = infoflow_loss(student, torch.tensor([[1.0, 2.0], [3.0, -6e4], [0.0, 0.0], [0.0, 0.0]], dtype=dtype))
    check_finite(loss, student)


def test_steps_lower_it():
    student, teacher = features()
    student.requires_grad_()
    losses = twenty_steps(lambda: infoflow_loss(student, teacher), [student], lr=1.0)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("student", "teacher"), [("resnet8", "resnet14"), ("mobilenetv2_x0_5", "resnet8")])
def test_every_layer_and_the_embedding_of_any_networks_are_compared(student, teacher):
    harness = Harness(InfoFlow(), student=student, teacher=teacher)
    ours, theirs, batch = harness.outputs()
    assert isinstance(theirs, NetOutput)
    terms = harness.method(ours, theirs, batch)
    assert terms["flow"].item() == pytest.approx(slow(ours.embedding, theirs.embedding), rel=1e-3)
    expected = sum(slow(ours.features[n].flatten(1), theirs.features[m].flatten(1)) for n, m in harness.method.layers)
    assert terms["layers"].item() == pytest.approx(expected, rel=1e-3)


def test_the_layers_come_first():
    method = InfoFlow(decay=0.5, weight_layers=8.0)
    found = []
    for epoch in (0, 1, 3, 0):
        method.set_epoch(epoch)
        found.append(method.loss_weights["layers"])
    assert found == [8.0, 4.0, 1.0, 8.0]
    harness = Harness(method)
    harness.begin_fit(epoch=22)  # a weight of 1.9e-6
    assert harness.terms()["layers"] > 0
    harness.begin_fit(epoch=23)
    assert harness.terms()["layers"] == 0.0
    assert method.loss_weights["layers"] == 0.0
    assert InfoFlow().loss_weights == {"ce": 1.0, "flow": 1.0, "layers": 100.0}


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_bad_arguments_are_refused(decay):
    with pytest.raises(ACKDError, match=rf"decay is {decay} in InfoFlow"):
        InfoFlow(decay=decay)
