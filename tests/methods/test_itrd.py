from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ITRD
from ackd_lightning.methods.itrd import correlation_loss, mutual_information_loss
from ackd_lightning.testing import Harness
from ackd_lightning.types import Batch, NetOutput
from methods.helpers import check_finite, twenty_steps


def embeddings(images: int = 6, ours: int = 5, theirs: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(images, ours, generator=generator), 2 + 3 * torch.randn(images, theirs, generator=generator)


def slow_correlation(student: Tensor, teacher: Tensor, alpha: float) -> float:
    total, images = 0.0, len(student)
    for i in range(student.shape[1]):
        s, t = student[:, i].double().numpy(), teacher[:, i].double().numpy()
        deviation = s.std(ddof=1) * t.std(ddof=1)
        c = sum((s - s.mean()) * (t - t.mean())) / deviation / images if deviation else 0.0
        total += abs(c - 1) ** (2 * alpha)
    return math.log2(total)


def slow_information(student: Tensor, teacher: Tensor) -> float:
    def gram(rows: np.ndarray) -> np.ndarray:
        unit = [row / math.sqrt(sum(row**2)) for row in rows]
        return np.array([[sum(a * b) for b in unit] for a in unit])

    ours, theirs = gram(student.double().numpy()), gram(teacher.double().numpy())
    both = ours * theirs
    return float(((ours / np.trace(ours)) ** 2).sum() - ((both / np.trace(both)) ** 2).sum())


@pytest.mark.parametrize("alpha", [1.0, 1.01, 1.5])
def test_the_correlation_equals_a_slow_reference(alpha):
    assert correlation_loss(*embeddings(), alpha=alpha).item() == pytest.approx(
        slow_correlation(*embeddings(), alpha), rel=1e-4
    )


@pytest.mark.parametrize("theirs", [5, 8])
def test_the_mutual_information_equals_a_slow_reference(theirs):
    pair = embeddings(theirs=theirs)
    assert mutual_information_loss(*pair).item() == pytest.approx(slow_information(*pair), rel=1e-4)


def test_the_correlation_is_lowest_and_finite_at_equality_and_ignores_shift_and_scale():
    student, teacher = embeddings()
    lowest = correlation_loss(teacher, teacher, alpha=1.01)
    assert lowest.item() == pytest.approx(math.log2(5 * (1 / 6) ** 2.02), rel=1e-3)
    assert lowest < correlation_loss(student, teacher, alpha=1.01)
    changed = correlation_loss(student * torch.rand(5).add(0.1) + torch.randn(5), teacher, alpha=1.01)
    torch.testing.assert_close(changed, correlation_loss(student, teacher, alpha=1.01), rtol=1e-4, atol=1e-4)


def test_the_mutual_information_ignores_rotations_and_lengths():
    student, teacher = embeddings()
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    changed = mutual_information_loss(student @ rotation * torch.rand(6, 1).add(0.1), teacher)
    torch.testing.assert_close(changed, mutual_information_loss(student, teacher), rtol=1e-4, atol=1e-5)


def test_constant_dimensions_and_zero_embeddings_have_no_gradient_and_are_finite():
    student, teacher = embeddings()
    student[:, 2], teacher[:, 3] = 1.0, -7.0
    student.requires_grad_()
    correlation_loss(student, teacher, alpha=1.01).backward()
    assert student.grad.isfinite().all()
    assert not student.grad[:, 2:4].any()
    zero = torch.zeros(6, 5, requires_grad=True)
    loss = mutual_information_loss(zero, teacher)
    loss.backward()
    assert loss.item() == 0.0
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_the_largest_embeddings(dtype):
    student = torch.full((4, 5), -6e4, dtype=dtype)
    student[:2, 1] = 6e4
    teacher = student.flip(0).clone()
    student.requires_grad_()
    loss = correlation_loss(student, teacher, alpha=1.5) + mutual_information_loss(student, teacher)
    check_finite(loss, student)


def test_steps_lower_it():
    student, teacher = embeddings()
    student.requires_grad_()
    losses = twenty_steps(
        lambda: 2 * correlation_loss(student, teacher, alpha=1.01) + mutual_information_loss(student, teacher),
        [student],
        lr=0.5,
    )
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(
    ("student", "teacher"), [("resnet8", "resnet14"), ("resnet8", "wrn_16_2"), ("mobilenetv2_x0_5", "resnet8")]
)
def test_networks_of_any_architecture_are_compared(student, teacher):
    harness = Harness(ITRD(alpha=1.5), student=student, teacher=teacher)
    ours, theirs, batch = harness.outputs()
    terms = harness.method(ours, theirs, batch)
    projected = harness.method.projector(ours.embedding).detach()
    same = ours.embedding.shape[1] == theirs.embedding.shape[1]
    expected = slow_correlation(projected, theirs.embedding, 1.5)
    assert terms["corr"].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
    read = ours.embedding.detach() if same else projected
    assert terms["mi"].item() == pytest.approx(slow_information(read, theirs.embedding), rel=1e-3)


def test_a_network_without_an_embedding_is_refused():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 16 * 16, 5)

        def forward(self, image: Tensor) -> Tensor:
            return self.layer(image.flatten(1))

    with pytest.raises(ACKDError, match="ITRD"):
        Harness(ITRD(), teacher=Flat())


def test_labels_are_read_by_the_cross_entropy_alone():
    harness = Harness(ITRD())
    ours, theirs, batch = harness.outputs()
    other = Batch(batch.image, batch.target.roll(1), batch.index)
    first, second = (harness.method(ours, theirs, each) for each in (batch, other))
    assert torch.equal(first["corr"], second["corr"])
    assert torch.equal(first["mi"], second["mi"])
    assert not torch.equal(first["ce"], second["ce"])
    assert isinstance(ours, NetOutput)


def test_defaults_are_an_example_of_the_authors():
    method = ITRD()
    assert method.alpha == 1.01
    assert method.loss_weights == {"ce": 1.0, "corr": 2.0, "mi": 1.0}


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_an_order_that_is_not_positive_is_refused(value):
    with pytest.raises(ACKDError, match=rf"alpha is {value} in ITRD; it must be above 0"):
        ITRD(alpha=value)
