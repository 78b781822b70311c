"""A description survives as text, and text that cannot be right is refused."""

from __future__ import annotations

import json

import pytest

from ackd_lightning.deploy.description import Accuracy, Description
from ackd_lightning.errors import ACKDError

FULL = Description(
    "timm:lcnet_050",
    2,
    (48, 64),
    options={"in_chans": 4},
    head={"channels": 3},
    class_names=("cat", "dog \N{DOG}"),
    channels=4,
    mean=(0.1, 0.2, 0.3, 0.4),
    std=(1.0, 1.0, 1.0, 1.0),
    interpolation="bicubic",
    crop_pct=0.875,
    value_range=(0.0, 4095.0),
    background="black",
    pixels="float32",
    accuracy=(Accuracy("val", 0.5, 10), Accuracy("test", 0.25)),
    origin={"method": "KD", "teacher": "resnet110", "data": "Pets", "seed": "0", "date": "2026-01-31"},
    versions={"torch": "2.6"},
    checked="on 512 images",
    quantization="int8",
    dtype="float16",
    reads="uint8",
    batch=32,
)


@pytest.mark.parametrize("description", [FULL, Description("resnet8", 3, 16), FULL.replace(head=None, batch=1)])
def test_a_description_is_the_same_after_a_round_trip(description):
    text = description.metadata()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in text.items())
    assert Description.from_metadata(text, "a.onnx") == description


def test_lines_contain_what_a_user_asks_for():
    text = "\n".join(FULL.lines())
    for value in ("timm:lcnet_050", "48", "64", "0.3", "bicubic", "50.00%", "10", "resnet110", "2026-01-31", "512"):
        assert value in text
    assert FULL.image_shape == (4, 48, 64)
    assert Description("resnet8", 2, 16).names == ("0", "1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", None),
        ("num_classes", "many"),
        ("num_classes", "3"),
        ("input_size", None),
        ("input_size", "0"),
        ("class_names", '["one"]'),
        ("mean", "[0.1]"),
        ("crop_pct", "2"),
        ("crop_pct", "nothing"),
        ("channels", "17"),
        ("value_range", "[5, 1]"),
        ("reads", "float64"),
        ("val_count", "-1"),
        ("versions", "{]"),
        ("versions", "[1]"),
        ("batch", '"many"'),
        ("batch", "0"),
        ("model_options", "[" * 100_000),
    ],
)
def test_text_that_cannot_be_right_is_refused(key, value):
    text = FULL.metadata()
    text.pop(key, None)
    with pytest.raises(ACKDError, match=r"odd\.onnx"):
        Description.from_metadata(text if value is None else {**text, key: value}, "odd.onnx")


def test_unknown_entries_are_no_obstacle():
    text = {**FULL.metadata(), "future": json.dumps([1])}
    assert Description.from_metadata(text, "a.pt2") == FULL
