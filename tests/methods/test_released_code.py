"""Losses on the golden logits equal those of the functions that the authors released."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ackd_lightning.methods import DGKD, KD, NKD, RLD, SRRL, TTM, FitInfo, Networks
from ackd_lightning.methods.infoflow import infoflow_loss
from ackd_lightning.methods.itrd import correlation_loss, mutual_information_loss
from ackd_lightning.methods.skt import pattern_loss, relations
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import Batch, NetOutput, NetSpec

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = json.loads((GOLDEN / "released_losses.json").read_text(encoding="utf-8"))
with np.load(GOLDEN / "losses.npz") as arrays:
    STUDENT, TEACHER, ASSISTANT, TARGET = (
        torch.from_numpy(arrays[name]) for name in ("logits_s", "logits_t", "logits_a", "target")
    )
    MAPS = [[torch.from_numpy(arrays[f"{side}_f{stage}"]) for stage in (1, 2, 3)] for side in ("rs", "rt")]
SHARE = 1 - 1 / STUDENT.shape[1]
"""(K - 1) / K: the released standardisation divides by K - 1, so its logits are smaller by the root of this."""

METHODS = {
    ("rld", "default"): RLD(),
    ("rld", "other"): RLD(alpha=0.5, beta=2.0, temperature=2.0, confidence_temperature=3.0),
    ("ttm", "ttm"): TTM(temperature=10.0),
    ("ttm", "wttm"): TTM(temperature=5.0, weighted=True),
    ("nkd", "default"): NKD(),
    ("nkd", "other"): NKD(temperature=2.0, gamma=1.0),
    ("kd_ea", "kd_ea"): KD(entropy_temperature=3.0),
}


def value(method) -> float:
    batch = Batch(torch.zeros(8, 3, 2, 2), TARGET, torch.arange(8))
    terms = method(NetOutput(STUDENT), NetOutput(TEACHER), batch)
    return next(term.item() for name, term in terms.items() if name != "ce")


@pytest.mark.parametrize(("name", "case"), METHODS, ids=["-".join(each) for each in METHODS])
def test_a_loss_of_logits(name, case):
    assert value(METHODS[name, case]) == pytest.approx(RELEASED[name]["values"][case]["value"], rel=2e-4)


def test_standardised_logits():
    temperature = 2.0 / math.sqrt(SHARE)
    found = value(KD(standardize=True, temperature=temperature)) * SHARE  # without the larger temperature squared
    assert found == pytest.approx(RELEASED["kd_ls"]["values"]["kd_ls"]["value"], rel=2e-4)


@pytest.mark.parametrize("alpha", [1.01, 1.5])
def test_correlated_embeddings(alpha):
    expected = RELEASED["itrd"]["values"][f"correlation_{alpha}"]["value"]
    assert correlation_loss(STUDENT, TEACHER, alpha=alpha).item() == pytest.approx(expected, rel=2e-4)


def test_mutual_information_of_embeddings():
    expected = RELEASED["itrd"]["values"]["mutual"]["value"]
    assert mutual_information_loss(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("case", "student", "teacher"),
    [("logits", STUDENT, TEACHER), ("maps", MAPS[0][2], MAPS[1][2])],
    ids=["logits", "maps"],
)
def test_similarities_of_images(case, student, teacher):
    found = infoflow_loss(student, teacher).item() / len(student)  # the mean over both images
    assert found == pytest.approx(RELEASED["infoflow"]["values"][case]["value"], rel=2e-4)


def test_patterns_within_layers():
    found = [pattern_loss(ours, theirs).item() * ours[:, 0].numel() for ours, theirs in zip(*MAPS, strict=True)]
    assert found == pytest.approx(RELEASED["skt"]["values"]["patterns"]["value"], rel=2e-4)


def test_relations_between_layers():
    ours, theirs = (relations(each, (8, 8)) for each in MAPS)
    found = [(a - b).square().sum().item() / len(a) for a, b in zip(ours, theirs, strict=True)]
    assert found == pytest.approx(RELEASED["skt"]["values"]["relations"]["value"], rel=2e-4)


def test_softmax_regression():
    """The regressor's and the classifier's weights are sines and cosines of their positions."""
    method, network = SRRL(), create_model("resnet20", 100)
    shapes = ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8))
    method.build(Networks(student=NetSpec(100, shapes), teachers=(NetSpec(100, shapes, 64),)))
    with torch.no_grad():
        method.regressor[0].weight.copy_((torch.arange(4096.0).sin() / 8).view(64, 64, 1, 1))
        network.fc.weight.copy_((torch.arange(6400.0).cos() / 8).view(100, 64))
        network.fc.bias.copy_(torch.arange(100.0).sin())
    method.begin_fit(FitInfo(teachers=(FrozenTeacher(network),)))
    with torch.no_grad():
        embedding = MAPS[1][2].mean(dim=(2, 3))
        teacher = NetOutput(network.fc(embedding), None, embedding)
        batch = Batch(torch.zeros(8, 3, 2, 2), TARGET, torch.arange(8))
        terms = method(NetOutput(STUDENT, (MAPS[0][2],)), teacher, batch)
    for name in ("features", "logits"):
        assert terms[name].item() == pytest.approx(RELEASED["srrl"]["values"][name]["value"], rel=1e-3)


def test_several_guides(monkeypatch):
    method = DGKD(dropped=0)
    monkeypatch.setattr(method, "guide_logits", lambda batch: [TEACHER, ASSISTANT])
    batch = Batch(torch.zeros(8, 3, 2, 2), TARGET, torch.arange(8))
    found = method(NetOutput(STUDENT), None, batch)["kd"].item() / STUDENT.shape[1]  # a mean over the classes
    assert found == pytest.approx(RELEASED["dgkd"]["values"]["kd"]["value"], rel=2e-4)
