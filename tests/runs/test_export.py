"""Exported students carry the names of their classes."""

from __future__ import annotations

import json

import pytest
import torch

from ackd_lightning.deploy.student import load_student
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weights import read_metadata, save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.runs.export import export_student

NAMES = ["cat", "dog", "bird \N{BIRD}"]


def checkpoint(path, **metadata):
    """A checkpoint of a student that was trained without auxiliary learners."""
    network = create_model("resnet8", 3).eval()
    known = {
        "num_classes": 3,
        "input_size": 16,
        "mean": None,
        "std": None,
        "data": "d",
        "method": "CE",
        "seed": 0,
        "model": "resnet8",
    }
    state = {f"student.backbone.{key}": value for key, value in network.state_dict().items()}
    content = {"ackd_lightning": {**known, "epoch": 1, **metadata}, "state_dict": state}
    torch.save(content, path)
    return network


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"class_names": None}, None),
        ({"class_names": tuple(NAMES)}, NAMES),
        ({"class_names": NAMES}, NAMES),
    ],
    ids=["missing", "none", "tuple", "list"],
)
def test_class_names_reach_the_file_and_the_network(tmp_path, metadata, expected):
    network = checkpoint(tmp_path / "a.ckpt", **metadata)
    exported = export_student(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert exported.largest_difference == 0.0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.ckpt", "a.safetensors"]
    stated = read_metadata(tmp_path / "a.safetensors").get("class_names")
    assert (json.loads(stated) if stated else None) == expected
    loaded = load_student(tmp_path / "a.safetensors")
    assert loaded.class_names == (tuple(expected) if expected else None)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    image = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(image), network(image))


@pytest.mark.parametrize("stated", ["", "[1, 2, 3]", '["one"]', '"abc"', "{}"])
def test_class_names_that_do_not_fit_are_refused(tmp_path, stated):
    path = tmp_path / "a.safetensors"
    save_weights(create_model("resnet8", 3), path, {"model": "resnet8", "num_classes": "3", "class_names": stated})
    with pytest.raises(ACKDError, match="class_names"):
        load_student(path)


def test_logits_that_differ_leave_the_old_file(tmp_path, monkeypatch):
    """A file that does not give the logits of training is never kept."""
    checkpoint(tmp_path / "a.ckpt")
    target = tmp_path / "a.safetensors"
    target.write_text("old")
    monkeypatch.setattr("ackd_lightning.runs.export.load_weights", lambda model, _: model.fc.bias.data.add_(1.0))
    with pytest.raises(ACKDError, match=r"a\.safetensors"):
        export_student(tmp_path / "a.ckpt", target, overwrite=True)
    assert target.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.ckpt", "a.safetensors"]
