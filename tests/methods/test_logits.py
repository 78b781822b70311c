"""Logit standardisation and entropy weights, over every method that takes them."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import entropy_weights, kl_per_image, standardized
from ackd_lightning.methods import ACKD, DIST, KD, Method
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.methods.description import describe, from_description
from ackd_lightning.methods.logits import LogitMethod
from ackd_lightning.models.freezing import frozen
from ackd_lightning.testing import Harness
from ackd_lightning.types import NetOutput


def fragments(argument: str) -> dict[str, dict]:
    """Descriptions of the methods whose constructor has an argument, by fragment."""
    found = {}
    for path in sorted((config_folder() / "methods").glob("*.yaml")):
        description = read_config(path)["model"]["method"]
        method = from_description(description)
        if argument in inspect.signature(type(method)).parameters and method.teacher != "own":  # these have own tests
            found[path.stem] = description
    return found


STANDARDIZED, WEIGHTED = fragments("standardize"), fragments("entropy_temperature")


def made(description: dict, **arguments) -> Method:
    return from_description({**description, "init_args": {**(description.get("init_args") or {}), **arguments}})


def logits(images: int = 6, classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return tuple(3 * torch.randn(images, classes, generator=generator) for _ in range(2))


def slow_z_scores(rows: Tensor) -> np.ndarray:
    return np.array([(np.array(row) - np.mean(row)) / np.std(row) for row in rows.double().tolist()])


def slow_entropy(row: list[float], temperature: float) -> float:
    powers = [math.exp(each / temperature) for each in row]
    return -sum(p / sum(powers) * math.log(p / sum(powers)) for p in powers)


# ---------------------------------------------------------------- the functions


def test_logits_are_standardised_as_a_slow_reference():
    student, _ = logits()
    np.testing.assert_allclose(standardized(student).numpy(), slow_z_scores(student), rtol=1e-5, atol=1e-6)


def test_standardised_logits_ignore_shift_and_scale():
    student, _ = logits()
    shift, scale = torch.randn(len(student), 1), torch.rand(len(student), 1) + 0.1
    torch.testing.assert_close(standardized(scale * student + shift), standardized(student), atol=1e-5, rtol=1e-5)


def test_equal_logits_are_zeros_without_gradient():
    student = torch.full((2, 5), 3.3, requires_grad=True)
    (standardized(student) * torch.randn(2, 5)).sum().backward()
    assert not standardized(student).any()
    assert not student.grad.any()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_weights_of_images_equal_a_slow_reference(temperature):
    student, teacher = logits()
    found = entropy_weights(student.requires_grad_(), teacher, temperature=temperature)
    assert not found.requires_grad
    for weight, s, t in zip(found.tolist(), student.tolist(), teacher.tolist(), strict=True):
        h_s, h_t = slow_entropy(s, temperature), slow_entropy(t, temperature)
        assert weight == pytest.approx((h_t + h_t * h_s / math.log(7)) / 2, rel=1e-4)


def test_the_weights_of_images_are_between_zero_and_the_entropy_of_equal_classes():
    even, sure = torch.zeros(1, 7), torch.tensor([[900.0] + [0.0] * 6])
    assert entropy_weights(even, even, temperature=1.0).item() == pytest.approx(math.log(7))
    assert entropy_weights(even, sure, temperature=1.0).item() == pytest.approx(0.0)


# ---------------------------------------------------------------- KD


def test_kd_on_standardised_logits_equals_a_slow_reference(scene):
    here = scene(0)
    found = KD(standardize=True, temperature=2.0)(here.student, here.teacher, here.batch)["kd"].item()
    total = 0.0
    for s, t in zip(slow_z_scores(here.z_s.detach()), slow_z_scores(here.z_t.detach()), strict=True):
        p_s, p_t = (np.exp(each / 2.0) / np.exp(each / 2.0).sum() for each in (s, t))
        total += 4.0 * (p_t * np.log(p_t / p_s)).sum()
    assert found == pytest.approx(total / len(here.z_s), rel=1e-5)


def test_weighted_kd_equals_a_slow_reference(scene):
    here = scene(0)
    found = KD(entropy_temperature=3.0)(here.student, here.teacher, here.batch)["kd"].item()
    losses = kl_per_image(here.z_s, here.z_t, temperature=4.0).tolist()
    total = 0.0
    for loss, s, t in zip(losses, here.z_s.tolist(), here.z_t.tolist(), strict=True):
        h_s, h_t = slow_entropy(s, 3.0), slow_entropy(t, 3.0)
        total += loss * (h_t + h_t * h_s / math.log(len(s))) / 2
    assert found == pytest.approx(total / len(losses), rel=1e-5)


def test_the_fragments_have_the_authors_values():
    (standardized_kd, weighted_kd) = (made(STANDARDIZED["kd_ls"]), made(WEIGHTED["kd_ea"]))
    assert standardized_kd.standardize
    assert standardized_kd.temperature == 2.0
    assert standardized_kd.loss_weights == {"ce": 0.1, "kd": 9.0}
    assert weighted_kd.entropy_temperature == 3.0


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("cls", [KD, ACKD])
def test_a_temperature_that_is_not_positive_is_refused(cls, value):
    with pytest.raises(ACKDError, match=rf"entropy_temperature is {value} in {cls.__name__}; it must be above 0"):
        cls(entropy_temperature=value)


# ---------------------------------------------------------------- every method that takes them


def test_the_methods_that_compare_logits_take_them():
    assert {"kd", "kd_ls", "dkd", "dist", "ackd", "ackd_direct"} <= set(STANDARDIZED)
    assert {"kd", "kd_ea", "dkd", "ackd", "ackd_direct"} <= set(WEIGHTED)


def scaled(output: NetOutput, factor: float) -> NetOutput:
    branches = tuple(scaled(each, factor) for each in output.branches)
    return NetOutput(factor * output.logits + 1.0, output.features, output.embedding, branches)


@pytest.mark.parametrize("name", STANDARDIZED)
def test_terms_of_distillation_ignore_shift_and_scale_of_standardised_logits(name):
    harness = Harness(made(STANDARDIZED[name], standardize=True), teacher="resnet8")
    student, teacher, batch = harness.outputs()
    expected = harness.method(student, teacher, batch)
    shifted = harness.method(scaled(student, 2.0), scaled(teacher, 3.0), batch)
    plain = made(STANDARDIZED[name], standardize=False)
    kept = [term for term in expected if not term.startswith("ce") and term != "adv"]
    assert kept
    for term in kept:
        torch.testing.assert_close(shifted[term], expected[term], rtol=1e-3, atol=1e-5)
    if not isinstance(plain, ACKD):
        terms = plain(student, teacher, batch)
        assert all(not torch.equal(terms[term], expected[term]) for term in kept)
        assert torch.equal(terms["ce"], expected["ce"])


@pytest.mark.parametrize("name", WEIGHTED)
def test_an_image_of_which_the_teacher_is_sure_has_no_weight(name):
    harness = Harness(made(WEIGHTED[name], entropy_temperature=1.0, standardize=False), teacher="resnet8")
    student, teacher, batch = harness.outputs()
    sure = torch.nn.functional.one_hot(batch.target, teacher.logits.shape[1]) * 900.0
    terms = harness.method(student, NetOutput(sure), batch)
    for term, value in terms.items():  # an ACKD group is not sure
        if not term.startswith("ce") and term not in ("adv", "kd_target"):
            assert value.item() == pytest.approx(0.0, abs=1e-5), term


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted({*STANDARDIZED}))
def test_value_and_gradient_are_finite_at_the_largest_logits(name, dtype):
    arguments = {"entropy_temperature": 3.0} if name in WEIGHTED else {}
    harness = Harness(made(STANDARDIZED[name], standardize=True, **arguments), teacher="resnet8")
    auxiliary = [each for group in harness.method.auxiliary_parameters().values() for each in group]
    student, teacher, batch = harness.outputs()
    size = teacher.logits.shape
    extreme = torch.full(size, -6e4, dtype=dtype)
    extreme[:, 1] = 6e4
    leaf = extreme.flip(1).clone().requires_grad_()
    branches = tuple(NetOutput(leaf, each.features, each.embedding) for each in student.branches)
    with frozen(auxiliary):
        terms = harness.method(
            NetOutput(leaf, student.features, student.embedding, branches), NetOutput(extreme), batch
        )
        loss = weighted_loss(harness.method, terms)
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted({*STANDARDIZED}))
def test_a_description_keeps_both(name):
    arguments = {"entropy_temperature": 2.5} if name in WEIGHTED else {}
    method = made(STANDARDIZED[name], standardize=True, **arguments)
    again = from_description(describe(method))
    assert again.standardize
    assert isinstance(again, DIST) or again.entropy_temperature == arguments.get("entropy_temperature")


def test_the_base_class_is_no_method_itself():
    with pytest.raises(NotImplementedError):
        LogitMethod()(NetOutput(torch.zeros(1, 2)), None, None)
    assert isinstance(LogitMethod(), nn.Module)
