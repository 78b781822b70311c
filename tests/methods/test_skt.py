from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import kd_loss
from ackd_lightning.methods import SKT
from ackd_lightning.methods.skt import pattern_loss, relations
from ackd_lightning.testing import Harness, RandomImages
from methods.helpers import check_finite


def maps(seed: int, *shapes: tuple[int, int, int], images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(images, *shape, generator=generator) + 1 for shape in shapes]


def slow_patterns(student: Tensor, teacher: Tensor) -> float:
    images, _, height, width = student.shape
    values = []
    for b in range(images):
        for y in range(height):
            for x in range(width):
                ours, theirs = student[b, :, y, x].tolist(), teacher[b, :, y, x].tolist()
                product = sum(s * t for s, t in zip(ours, theirs, strict=True))
                values.append(1 - product / math.hypot(*ours) / math.hypot(*theirs))
    return sum(values) / len(values)


def slow_relations(features: list[Tensor], size: int) -> list[list[float]]:
    found = []
    for n in range(len(features)):
        for m in range(n + 1, len(features)):
            entries = []
            for b in range(len(features[0])):
                pooled = []
                for feature in (features[n][b], features[m][b]):
                    step = feature.shape[1] // size
                    channels = []
                    for channel in feature.double():
                        values = [
                            float(channel[y * step : (y + 1) * step, x * step : (x + 1) * step].max())
                            for y in range(size)
                            for x in range(size)
                        ]
                        mean = sum(values) / len(values)
                        variance = sum((each - mean) ** 2 for each in values) / len(values)
                        channels.append([(each - mean) / math.sqrt(variance + 1e-5) for each in values])
                    pooled.append(channels)
                entries += [
                    sum(a * c for a, c in zip(ours, theirs, strict=True)) / len(ours)
                    for ours in pooled[0]
                    for theirs in pooled[1]
                ]
            found.append(entries)
    return found


def test_patterns_equal_a_slow_reference():
    student, teacher = *maps(1, (3, 4, 2)), *maps(2, (3, 4, 2))
    assert pattern_loss(student, teacher).item() == pytest.approx(slow_patterns(student, teacher), rel=1e-5)


def test_relations_equal_a_slow_reference():
    features = maps(3, (2, 8, 8), (3, 4, 4), (4, 2, 2))
    for found, expected in zip(relations(features, (2, 2)), slow_relations(features, 2), strict=True):
        assert found.flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_both_are_those_of_the_teacher_at_equality_and_ignore_its_scale():
    (student,) = maps(1, (3, 4, 4))
    assert pattern_loss(student, 3 * student).item() == pytest.approx(0.0, abs=1e-6)
    features = maps(3, (2, 8, 8), (3, 4, 4))
    scaled = [5 * each + 2 for each in features]
    torch.testing.assert_close(relations(features, (4, 4))[0], relations(scaled, (4, 4))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_at_the_largest_constant_and_zero_features(dtype):
    student = torch.full((2, 3, 4, 4), 6e4, dtype=dtype)
    student[:, 1], student[1, 2] = 0.0, -6e4
    student.requires_grad_()
    loss = pattern_loss(student, student.detach().flip(1)) + relations([student, student], (2, 2))[0].square().mean()
    check_finite(loss, student)


def test_steps_lower_it():
    harness = Harness(SKT(weight_ce=0.0, weight_kd=0.0))
    optimizer = torch.optim.SGD([*harness.method.parameters(), *harness.module.student.parameters()], lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(harness.step().item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("student", "teacher"), [("resnet8", "wrn_16_2"), ("mobilenetv2_x0_5", "resnet8")])
def test_terms_of_any_networks(student, teacher):
    harness = Harness(SKT(), student=student, teacher=teacher)
    method = harness.method
    ours, theirs, batch = harness.outputs()
    terms = method(ours, theirs, batch)
    adapted = [adapter(ours.features[n]) for adapter, (n, _) in zip(method.adapters, method.layers, strict=True)]
    aims = [theirs.features[m] for _, m in method.layers]
    torch.testing.assert_close(terms["kd"], kd_loss(ours.logits, theirs.logits, temperature=4.0))
    expected = [
        (a - b).square().mean()
        for a, b in zip(*(relations([x[n] for n in method.related], method.size) for x in (adapted, aims)), strict=True)
    ]
    assert method.related == [
        n for n, (a, b) in enumerate(zip(adapted, aims, strict=True)) if 1 not in a.shape + b.shape
    ]
    torch.testing.assert_close(terms["relations"], torch.stack(expected).sum())
    if student == "resnet8":
        expected = sum(slow_patterns(a, b) for a, b in zip(adapted, aims, strict=True))
        assert terms["patterns"].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["weight_kd", "weight_patterns", "weight_relations"])
def test_bad_arguments_are_refused(name):
    with pytest.raises(ACKDError, match=rf"{name} is -1.0 in SKT"):
        SKT(**{name: -1.0})


@pytest.mark.parametrize(
    ("size", "teacher", "said"),
    [
        (32, "resnet18", "leaves out 1 of"),
        (8, "resnet18", "fewer than two pairs"),
        (2, "resnet18", "fewer than two pairs"),
        (32, "resnet14", None),
    ],
)
def test_maps_of_one_position_have_no_relations_and_do_not_hide_those_of_others(size, teacher, said, capsys):
    harness = Harness(SKT(), student="resnet8", teacher=teacher, data=RandomImages(input_size=size))
    relation = float(harness.terms()["relations"].detach())
    shown = capsys.readouterr().out
    assert (said in shown) if said else ("SKT: `relations`" not in shown)
    assert (relation > 0) == (said != "fewer than two pairs")
