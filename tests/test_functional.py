from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as torch_cross_entropy

from ackd_lightning.functional import cross_entropy, kd_loss, kl_divergence, whole_batch

GOLDEN = Path(__file__).parent / "golden"
KD_VALUES = json.loads((GOLDEN / "losses.json").read_text())["kd"]
CE_VALUES = json.loads((GOLDEN / "losses.json").read_text())["ce"]["values"]
DIRECTIONS = ("forward", "reverse", "js")


def golden_logits(*names: str) -> list[torch.Tensor]:
    with np.load(GOLDEN / "losses.npz") as arrays:
        return [torch.from_numpy(arrays[name]) for name in names]


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def slow_divergence(student, teacher, temperature: float, direction: str) -> float:
    """Loop over images and classes, without tau squared."""

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        s, t = softmax(student_row, temperature), softmax(teacher_row, temperature)
        if direction == "forward":
            total += kl(t, s)
        elif direction == "reverse":
            total += kl(s, t)
        else:
            middle = [(a + b) / 2 for a, b in zip(s, t, strict=True)]
            total += (kl(s, middle) + kl(t, middle)) / 2
    return total / len(student)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(4, 6), 3 * torch.randn(4, 6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_equals_the_slow_reference(pair, direction, temperature):
    value = kl_divergence(*pair, temperature=temperature, direction=direction, scale_temperature=False)
    assert value.dtype is torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(slow_divergence(*pair, temperature, direction), rel=2e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_divergence_is_zero_at_equality_and_positive_elsewhere(pair, direction):
    student, teacher = pair
    shifted = student + torch.arange(4.0).view(4, 1)  # softmax does not see a constant per image
    assert kl_divergence(student, student, temperature=4.0, direction=direction).item() == 0.0
    assert abs(kl_divergence(student, shifted, temperature=4.0, direction=direction).item()) < 1e-5
    assert kl_divergence(student, teacher, temperature=4.0, direction=direction).item() > 0.01


def test_forward_and_reverse_are_each_other_with_arguments_swapped_and_differ(pair):
    student, teacher = pair
    forward = kl_divergence(student, teacher, temperature=2.0, direction="forward")
    reverse = kl_divergence(student, teacher, temperature=2.0, direction="reverse")
    assert not torch.isclose(forward, reverse, rtol=1e-2)
    swapped = kl_divergence(teacher, student, temperature=2.0, direction="reverse")
    torch.testing.assert_close(forward, swapped)


def test_jensen_shannon_is_symmetric_and_at_most_log_2(pair):
    student, teacher = pair
    there = kl_divergence(student, teacher, temperature=1.0, direction="js")
    back = kl_divergence(teacher, student, temperature=1.0, direction="js")
    torch.testing.assert_close(there, back)
    far = kl_divergence(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]), temperature=1.0, direction="js")
    assert far.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scaling_multiplies_by_the_squared_temperature(pair, direction):
    plain = kl_divergence(*pair, temperature=3.0, direction=direction, scale_temperature=False)
    scaled = kl_divergence(*pair, temperature=3.0, direction=direction)
    torch.testing.assert_close(scaled, 9.0 * plain)


def test_mean_over_the_batch_does_not_depend_on_its_size(pair):
    student, teacher = pair
    once = kl_divergence(student, teacher, temperature=4.0)
    twice = kl_divergence(student.repeat(2, 1), teacher.repeat(2, 1), temperature=4.0)
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("temperature", [1, 3, 4])
def test_kd_equals_the_golden_of_an_independent_implementation(temperature):
    student, teacher = golden_logits("logits_s", "logits_t")
    value = kd_loss(student, teacher, temperature=float(temperature)).item()
    assert value == pytest.approx(KD_VALUES["values"][f"kd_T{temperature}.loss"], rel=2e-4)


def test_reverse_equals_the_golden_with_arguments_swapped():
    student, teacher = golden_logits("logits_s", "logits_t")
    value = kl_divergence(student, teacher, temperature=4.0, direction="reverse").item()
    swapped = KD_VALUES["values"]["kd_T4_arguments_swapped.loss (=KL(student||teacher)*16)"]
    assert value == pytest.approx(swapped, rel=2e-4)


def test_gradients_equal_the_golden():
    student, teacher = (each.requires_grad_() for each in golden_logits("logits_s", "logits_t"))
    kl_divergence(student, teacher, temperature=4.0).backward()
    assert student.grad.norm().item() == pytest.approx(KD_VALUES["grad_l2"]["logits_s"], rel=2e-4)
    assert teacher.grad.norm().item() == pytest.approx(KD_VALUES["grad_l2"]["logits_t"], rel=2e-4)


@pytest.mark.parametrize("name", ["logits_s", "logits_t", "logits_a"])
def test_cross_entropy_equals_the_golden(name):
    logits, target = golden_logits(name, "target")
    assert cross_entropy(logits, target).item() == pytest.approx(CE_VALUES[f"ce({name},target)"], rel=2e-4)


def test_cross_entropy_equals_the_slow_reference_and_is_computed_in_float32():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4), torch.tensor([0, 3, 1])
    slow = -sum(math.log(softmax(row, 1.0)[label]) for row, label in zip(logits.tolist(), target.tolist(), strict=True))
    assert cross_entropy(logits, target).item() == pytest.approx(slow / 3, rel=1e-5)
    half = logits.bfloat16()
    assert torch.equal(cross_entropy(half, target), torch_cross_entropy(half.float(), target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_extreme_logits_give_finite_values_and_gradients(dtype, direction, temperature):
    top = 6e4
    student = torch.tensor([[top, -top, 0.0], [top, top, -top], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-top, top, 0.0], [-top, -top, top], [top, -top, top]], dtype=dtype, requires_grad=True)
    loss = kl_divergence(student, teacher, temperature=temperature, direction=direction)
    loss.backward()
    assert loss.dtype is torch.float32
    assert math.isfinite(loss.item())
    assert loss.item() > 0
    assert student.grad.isfinite().all()
    assert teacher.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cross_entropy_is_finite_for_extreme_logits(dtype):
    logits = torch.tensor([[6e4, -6e4], [-6e4, 6e4]], dtype=dtype, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1, 1]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_twenty_gradient_steps_lower_the_divergence_at_every_step(pair, direction):
    student, teacher = pair[0].requires_grad_(), pair[1]
    values = []
    for _ in range(20):
        loss = kl_divergence(student, teacher, temperature=2.0, direction=direction)
        values.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, student)
        student = (student - 0.5 * gradient).detach().requires_grad_()
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    assert values[-1] < 0.95 * values[0]


def test_the_teacher_gets_no_gradient_from_kd(pair):
    student, teacher = (each.requires_grad_() for each in pair)
    kd_loss(student, teacher, temperature=4.0).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_kd_is_the_scaled_forward_divergence(pair):
    student, teacher = pair
    expected = kl_divergence(student, teacher, temperature=4.0, direction="forward", scale_temperature=True)
    assert torch.equal(kd_loss(student, teacher, temperature=4.0), expected)


def test_an_unknown_direction_is_refused_by_name(pair):
    with pytest.raises(ValueError, match=r"'backward'.*'forward', 'reverse' or 'js'"):
        kl_divergence(*pair, temperature=4.0, direction="backward")


def test_the_whole_batch_of_a_single_process_is_its_own():
    """Of two processes: ``contracts/test_methods_ddp.py``."""
    shard = torch.randn(3, 2, requires_grad=True)
    assert whole_batch(shard) is shard
