"""Figures for few and many classes, and text that Markdown could misread."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ackd_lightning.deploy.report import content, figures
from ackd_lightning.deploy.report.elements import escaped, table
from ackd_lightning.deploy.report.measuring import Measured, Pictures
from ackd_lightning.deploy.report.page import _calibration, page
from ackd_lightning.runs.figures import visible


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


@pytest.mark.parametrize("count", [2, 25, 60])
def test_figures_of_few_and_many_classes(count):
    names = [f"class $ {number} with a long name_{number}" for number in range(count)]
    matrix = np.eye(count, dtype=np.int64) * 9 + 1
    shares, ends = [0.5] * count, [(0.4, 0.6)] * count
    for png in (figures.per_class(shares, ends, names), figures.confusion(matrix, names)):
        image = opened(png)
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10  # not blank


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (3, 7), (4, 3)])
def test_pictures_of_any_channels(channels, count):
    images = visible(torch.randn(count, channels, 8, 6), (0.5,) * channels, (0.25,) * channels)
    assert images.shape == (count, 8, 6, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    opened(figures.mistakes(images, [("a_b$", "c, 90 %", "x" * 90)] * count))
    opened(figures.heat_maps(images, [("teacher", images, ["a"] * count)], ["b"] * count))


@pytest.mark.parametrize("name", ["a|b", "<script>", "*x*", "![a](b)", "`c`", "two\nlines", "a_b_c", "&lt;"])
def test_class_names_are_shown_as_they_are(name):
    shown = page(f"# x\n\n{table(['a', 'b'], [[escaped(name), '1']])}", {})
    cell = shown.split("<td>")[1].split("</td>")[0]
    expected = " ".join(name.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert cell == expected
    assert shown.count("<td") == 2


def test_confused_pairs_and_precision():
    matrix = np.array([[8, 2, 0], [0, 5, 5], [0, 0, 0]])
    pairs = content.confused_pairs(matrix, ["a", "b", "c"])
    assert [(each["class"], each["taken_for"], each["images"], each["share"]) for each in pairs] == [
        ("b", "c", 5, 0.5),
        ("a", "b", 2, 0.2),
    ]
    classes = content.per_class(matrix, ["a", "b", "c"])
    assert [(each["class"], each["acc"], each["precision"]) for each in classes] == [("a", 0.8, 1.0), ("b", 0.5, 5 / 7)]


def test_agreement_counts_every_image_once():
    target = torch.tensor([0, 0, 1, 1, 1])
    answers = {"student": torch.tensor([0, 1, 1, 0, 0]), "teacher": torch.tensor([0, 0, 0, 0, 1])}
    none = Pictures(torch.empty(0), torch.empty(0))
    measured = Measured(target, torch.zeros(5, 2), answers, {}, 0.1, none, none)
    found = content.agreement(measured)
    assert [found[key] for key in ("both_right", "only_student", "only_teacher", "both_wrong")] == [1, 1, 2, 1]
    assert found["same_answer"] == pytest.approx(0.4)
    assert found["difference"] == pytest.approx(-0.2)
    measured.answers.pop("teacher")
    assert content.agreement(measured) is None


@pytest.mark.parametrize(("after", "advice"), [(0.8, "Divide the logits by 1.500"), (1.2, "keep the logits")])
def test_a_temperature_is_recommended_where_it_helps_on_test_images(after, advice):
    found = {
        "nll": 1.0,
        "ece": 0.05,
        "temperature": 1.5,
        "validation_images": 1000,
        "scaled": {"nll": after, "ece": 0.1},
    }
    text = "\n".join(_calibration({"calibration": found}, ["reliability"]))
    assert advice in text
    assert "1,000 validation images" in text
