from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import VkD
from ackd_lightning.methods.vkd import OrthogonalProjector, vkd_loss
from ackd_lightning.testing import Harness
from methods.helpers import check_finite, twenty_steps


def embeddings(images: int = 6, dimensions: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(3 * torch.randn(images, dimensions, generator=generator) for _ in range(2))


def slow(projected: Tensor, teacher: Tensor) -> float:
    total = 0.0
    for ours, theirs in zip(projected.tolist(), teacher.tolist(), strict=True):
        mean = sum(theirs) / len(theirs)
        deviation = math.sqrt(sum((each - mean) ** 2 for each in theirs) / len(theirs) + 1e-5)
        for a, b in zip(ours, theirs, strict=True):
            distance = abs(a - (b - mean) / deviation)
            total += 0.5 * distance**2 if distance < 1 else distance - 0.5
    return total / projected.numel()


def test_it_equals_a_slow_reference():
    assert vkd_loss(*embeddings()).item() == pytest.approx(slow(*embeddings()), rel=1e-5)


def test_it_is_zero_at_the_normalised_embedding_and_ignores_the_teachers_shift_and_scale():
    student, teacher = embeddings()
    assert vkd_loss(nn.functional.layer_norm(teacher, (5,)), teacher).item() == 0.0
    changed = vkd_loss(student, 2 * teacher + 7)
    torch.testing.assert_close(changed, vkd_loss(student, teacher), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 3), (3, 8), (8, 3)])
def test_the_projector_keeps_lengths_and_angles_also_after_steps(inputs, outputs):
    torch.manual_seed(0)
    projector = OrthogonalProjector(inputs, outputs)
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.5)
    before = projector.matrix().detach()
    for _ in range(5):
        optimizer.zero_grad()
        vkd_loss(projector(torch.randn(4, inputs)), torch.randn(4, outputs)).backward()
        optimizer.step()
    matrix = projector.matrix().detach()
    product = matrix @ matrix.T if inputs <= outputs else matrix.T @ matrix
    torch.testing.assert_close(product, torch.eye(min(inputs, outputs)), atol=1e-5, rtol=0)
    assert (matrix - before).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_the_largest_embeddings(dtype):
    student = torch.full((2, 5), -6e4, dtype=dtype)
    student[:, 1] = 6e4
    teacher = student.flip(1).clone()
    student.requires_grad_()
    projector = OrthogonalProjector(5, 5)
    loss = vkd_loss(projector(student), teacher)
    check_finite(loss, student, projector.weight)


def test_steps_lower_it():
    student, teacher = embeddings()
    student.requires_grad_()
    losses = twenty_steps(lambda: vkd_loss(student, teacher), [student], lr=5.0)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("student", "teacher"), [("resnet8", "resnet14"), ("resnet8", "wrn_16_2")])
def test_networks_of_any_width_are_compared(student, teacher):
    harness = Harness(VkD(), student=student, teacher=teacher)
    ours, theirs, batch = harness.outputs()
    terms = harness.method(ours, theirs, batch)
    projected = ours.embedding @ harness.method.projector.matrix()
    assert terms["vkd"].item() == pytest.approx(slow(projected.detach(), theirs.embedding), rel=1e-4)
    assert harness.method.loss_weights == {"ce": 1.0, "vkd": 1.0}


@pytest.mark.parametrize("name", ["weight_ce", "weight_vkd"])
def test_bad_arguments_are_refused(name):
    with pytest.raises(ACKDError, match=rf"{name} is -1.0 in VkD; it must be"):
        VkD(**{name: -1.0})
