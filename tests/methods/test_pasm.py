from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import kd_loss
from ackd_lightning.methods import PASM, pasm
from ackd_lightning.methods.pasm import informative_point, without_region
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.testing import Harness
from ackd_lightning.types import NetOutput
from methods.helpers import extreme


def test_the_point_is_where_a_small_change_moves_the_margin_most():
    generator = torch.Generator().manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 5 * 7, 6)).double()
    image = torch.randn(2, 3, 5, 7, generator=generator)
    teacher = FrozenTeacher(network)
    logits, point = informative_point(teacher, image)
    assert logits.shape == (2, 6)
    assert not logits.requires_grad
    for number in range(2):
        one = image[number : number + 1].double()

        def margin(changed: torch.Tensor) -> float:
            first, second = network(changed)[0].topk(2).values.tolist()
            return first - second

        slopes = {}
        for y in range(5):
            for x in range(7):
                slopes[y, x] = 0.0
                for channel in range(3):
                    changed = one.clone()
                    changed[0, channel, y, x] += 1e-6
                    slopes[y, x] += abs(margin(changed) - margin(one))
        assert tuple(point[number].tolist()) == max(slopes, key=slopes.get)
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_attack_is_in_float32_under_autocast(dtype):
    harness = Harness(PASM())
    teacher, image = harness.module.teacher, harness.data.batch().image
    expected = informative_point(teacher, image)
    with torch.autocast("cpu", dtype=dtype):
        found = informative_point(teacher, image)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_the_region_is_a_rectangle_around_the_point():
    image = torch.rand(3, 2, 8, 6) + 1
    point = torch.tensor([[4, 3], [0, 5], [7, 0]])
    found = without_region(image, point, 0.5)
    for number, (y, x) in enumerate(point.tolist()):
        for row in range(8):
            for column in range(6):
                inside = y - 2 <= row < y + 2 and x - 1 <= column < x + 2
                expected = 0.0 if inside else image[number, :, row, column]
                assert torch.equal(found[number, :, row, column], torch.zeros(2) + expected)
    assert int((without_region(image, point, 0.0) == 0).sum()) == 3 * 2  # one pixel of each image


def test_terms_are_those_of_the_whole_and_the_harder_images_and_statistics_are_of_the_whole():
    harness = Harness(PASM(temperature=2.0))
    student, teacher, batch = harness.outputs()
    assert teacher is None
    statistics = {key: value.clone() for key, value in harness.module.student.state_dict().items()}
    terms = harness.method(student, teacher, batch)
    for key, value in harness.module.student.state_dict().items():
        assert torch.equal(value, statistics[key]), key
    frozen = harness.module.teacher
    logits, point = informative_point(frozen, batch.image)
    torch.testing.assert_close(logits, frozen(batch.image).logits)
    mined = harness.module.student(without_region(batch.image, point, 0.25)).logits
    expected = {
        "ce": F.cross_entropy(student.logits, batch.target),
        "kd": kd_loss(student.logits, logits, temperature=2.0),
        "ce_mined": F.cross_entropy(mined, batch.target),
        "kd_mined": kd_loss(mined, logits, temperature=2.0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_and_gradients_are_finite_at_the_largest_logits(dtype, monkeypatch):
    harness = Harness(PASM())
    harness.begin_fit()
    student, mined = extreme(dtype), extreme(dtype, sign=-1)
    monkeypatch.setattr(harness.module.student, "forward", lambda image: NetOutput(mined))
    point = torch.zeros(8, 2, dtype=torch.int64)
    monkeypatch.setattr(pasm, "informative_point", lambda teacher, image: (extreme(dtype).flip(1).detach(), point))
    terms = harness.method(NetOutput(student), None, harness.data.batch())
    assert {each.dtype for each in terms.values()} == {torch.float32}
    sum(terms.values()).backward()
    for value in (*terms.values(), student.grad, mined.grad):
        assert value.isfinite().all()


def test_steps_lower_the_loss_on_harder_images():
    harness = Harness(PASM(weight_ce=0.0, weight_kd=0.0))
    losses = harness.train(steps=15)
    assert losses[-1] < 0.8 * losses[0]


def test_several_teachers_are_refused():
    with pytest.raises(ACKDError, match="PASM has one teacher"):
        Harness(PASM(), teacher=["resnet8", "resnet14"])


@pytest.mark.parametrize("region", [-0.1, 1.1])
def test_bad_arguments_are_refused(region):
    with pytest.raises(ACKDError, match=rf"region is {region} in PASM"):
        PASM(region=region)


def test_a_teacher_without_logits_is_refused_before_the_first_step():
    harness = Harness(PASM())
    harness.module.teacher.features_only = True
    with pytest.raises(ACKDError, match="PASM reads logits"):
        harness.begin_fit()
