"""A run, a checkpoint and every file are opened and run in one way."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from ackd_lightning import load_student
from ackd_lightning.deploy.files import ExportedNetwork, open_network
from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.export import export_student
from deploy.samples import NAMES, checkpoint


@pytest.fixture
def run(tmp_path):
    network = checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    export_student(tmp_path / "run/checkpoints/last.ckpt", tmp_path / "run/student.safetensors")
    return tmp_path / "run", network


@pytest.mark.parametrize("name", ["", "checkpoints/last.ckpt", "student.safetensors"])
def test_logits_and_description(run, name):
    folder, network = run
    opened = open_network(folder / name if name else folder)
    image = torch.randn(3, 3, 16, 16)
    assert torch.equal(opened.logits(image), network(image))
    assert opened.description.names == tuple(NAMES)
    assert (opened.description.method, opened.description.data, opened.description.teacher) == ("CE", "Pets", None)
    assert opened.description.versions["torch"] == torch.__version__
    predictions = opened.predict(torch.randint(0, 256, (5, 3, 20, 30), dtype=torch.uint8), batch_size=2)
    assert len(predictions.class_names) == 5
    assert predictions.probabilities.sum(1).allclose(torch.ones(5))


def test_a_file_is_one_checkpoint(run):
    folder, _ = run
    for name in ("checkpoints/last.ckpt", "student.safetensors"):
        with pytest.raises(ACKDError, match=r"--which is best and .* is a file and not a run"):
            open_network(folder / name, which="best")


def test_a_student_predicts(run):
    folder, network = run
    student = load_student(folder / "student.safetensors")
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    expected = network((images / 255 - 0.4) / 0.2).softmax(1)
    predictions = student.predict(images)
    assert predictions.probabilities.allclose(expected, atol=1e-5)
    assert predictions.class_names == [NAMES[number] for number in expected.argmax(1).tolist()]
    assert student.predict(images[0]).probabilities.allclose(expected[:1], atol=1e-5)
    with pytest.raises(ACKDError, match="no images"):
        student.predict([])
    with pytest.raises(ACKDError, match="ndarray"):
        student.predict(images[0].numpy())


@pytest.mark.parametrize("name", ["nowhere.onnx", "picture.png", "plain.safetensors", "text.safetensors", "empty"])
def test_what_cannot_be_opened_is_named(tmp_path, name):
    (tmp_path / "picture.png").write_bytes(b"png")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors", {"format": json.dumps("pt")})
    with pytest.raises(ACKDError, match=name):
        open_network(tmp_path / name)


def test_more_images_than_a_file_takes_at_once_are_divided(run):
    opened = open_network(run[0])

    def at_most_four(images):
        assert len(images) <= 4
        return opened.run(images)

    small = ExportedNetwork(opened.path, opened.description.replace(batch=4), at_most_four, kind="pt2")
    images = torch.randn(11, 3, 16, 16)
    assert torch.allclose(small.logits(images), opened.logits(images), atol=1e-6)
    assert len(small.predict(images.abs().clamp(max=1), batch_size=11).class_names) == 11
