from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import SRRL
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.testing import Harness
from ackd_lightning.types import NetOutput
from methods.helpers import check_finite


def slow(method: SRRL, feature: Tensor, network: nn.Module, embedding: Tensor) -> tuple[float, float]:
    """The two distances, one number after the other, in double precision."""
    convolution, norm, _ = method.regressor
    weight = convolution.weight.detach().double()[:, :, 0, 0]
    maps = torch.einsum("dc,bchw->bdhw", weight, feature.detach().double())
    for channel in range(maps.shape[1]):
        values = maps[:, channel]
        spread = math.sqrt(((values - values.mean()) ** 2).mean() + norm.eps)
        maps[:, channel] = (values - values.mean()) / spread * norm.weight[channel].item() + norm.bias[channel].item()
    ours = [[float(each.clamp_min(0).mean()) for each in image] for image in maps]
    theirs = embedding.detach().double().tolist()
    rows, shifts = network.fc.weight.detach().double().tolist(), network.fc.bias.detach().double().tolist()

    def classify(vector: list[float]) -> list[float]:
        return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in zip(rows, shifts, strict=True)]

    def distance(first: list[list[float]], second: list[list[float]]) -> float:
        pairs = [(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)]
        return sum((a - b) ** 2 for a, b in pairs) / len(pairs)

    return distance(ours, theirs), distance([classify(each) for each in ours], [classify(each) for each in theirs])


@pytest.mark.parametrize(("student", "teacher"), [("resnet8", "resnet14"), ("mobilenetv2_x0_5", "resnet8")])
def test_both_distances_equal_a_slow_reference(student, teacher):
    network = create_model(teacher, 5)
    harness = Harness(SRRL(), student=student, teacher=network)
    ours, theirs, batch = harness.outputs()
    terms = harness.method(ours, theirs, batch)
    features, logits = slow(harness.method, ours.features[-1], network, theirs.embedding)
    assert terms["features"].item() == pytest.approx(features, rel=1e-3)
    assert terms["logits"].item() == pytest.approx(logits, rel=1e-3)


def test_they_are_zero_for_an_embedding_that_is_the_teachers():
    harness = Harness(SRRL(), student="resnet8", teacher="resnet8")
    ours, theirs, batch = harness.outputs()
    harness.method.regressor = nn.Identity()
    terms = harness.method(NetOutput(ours.logits, theirs.features), theirs, batch)
    assert terms["features"].item() == pytest.approx(0.0, abs=1e-10)
    assert terms["logits"].item() == pytest.approx(0.0, abs=1e-10)


def test_classes_that_were_selected_are_compared():
    harness = Harness(SRRL(), teacher="resnet8")
    harness.begin_fit()
    harness.method.given.select_classes([[4], [0, 1], [2]])
    ours, theirs, batch = harness.outputs()
    assert theirs.logits.shape[1] == 3
    harness.method.regressor = nn.Identity()
    same = harness.method(NetOutput(ours.logits, theirs.features), theirs, batch)
    assert same["logits"].item() == pytest.approx(0.0, abs=1e-10)


def test_logarithms_of_probabilities_are_compared_where_the_teacher_ends_in_a_softmax():
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = create_model("resnet8", 5)

        def forward(self, image: Tensor) -> Tensor:
            return self.net(image).softmax(dim=1)

    harness = Harness(SRRL(), student="resnet8", teacher=Sure())
    assert harness.method.given is None
    ours, theirs, batch = harness.outputs()
    assert isinstance(harness.method.given, FrozenTeacher)
    assert harness.method.given.gives_probabilities
    harness.method.regressor = nn.Identity()
    terms = harness.method(NetOutput(ours.logits, theirs.features), theirs, batch)
    assert terms["logits"].item() == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_value_and_gradient_are_finite_with_large_features_and_the_largest_logits(dtype):
    harness = Harness(SRRL(), teacher="resnet8")
    ours, theirs, batch = harness.outputs()
    feature = torch.full(ours.features[-1].shape, -500.0, dtype=dtype)
    feature[:2, 1] = 500.0
    feature.requires_grad_()
    large = NetOutput(theirs.logits.sign() * 6e4, None, theirs.embedding.sign().to(dtype) * 6e4)
    with torch.autocast("cpu", dtype=dtype):
        terms = harness.method(NetOutput(ours.logits, (feature,)), large, batch)
    loss = terms["features"] + terms["logits"]
    check_finite(loss, feature)


def test_training_lowers_both_distances():
    harness = Harness(SRRL(weight_ce=0.0), lr=0.05)
    before = harness.terms()
    harness.train(steps=20)
    after = harness.terms()
    assert after["features"] < before["features"]
    assert after["logits"] < before["logits"]


def test_a_teacher_whose_classifier_is_no_linear_layer_is_refused_before_the_fit():
    with pytest.raises(ACKDError, match="SRRL"):
        Harness(SRRL(), teacher="squeezenet1_1")


def test_a_step_before_the_fit_is_refused():
    harness = Harness(SRRL())
    harness._begun = True
    with pytest.raises(ACKDError, match="begin_fit"):
        harness.terms()
