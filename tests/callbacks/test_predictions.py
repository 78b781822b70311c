"""``predictions.csv`` has one line for each image, in their order, for any number of processes."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ackd_lightning.callbacks.predictions import PredictionFile


def batch(index):
    """Predictions for the images with these indices."""
    index = torch.tensor(index)
    return {"index": index, "target": index % 3, "prediction": (index + 1) % 3, "probability": index / 16}


def write(path, batches, *, others=None, rank=0):
    """Write what this process and another one predicted."""
    trainer = SimpleNamespace(world_size=1 if others is None else 2, is_global_zero=rank == 0)
    PredictionFile(path).write_on_epoch_end(trainer, None, [batch(each) for each in batches], None)


def indices(path):
    return [int(row["index"]) for row in csv.DictReader(path.read_text().splitlines())]


def test_one_process_keeps_the_order_of_the_images(tmp_path):
    write(tmp_path / "new" / "a.csv", [[3, 1], [2]])
    assert indices(tmp_path / "new" / "a.csv") == [3, 1, 2]
    first = (tmp_path / "new" / "a.csv").read_text().splitlines()[:2]
    assert first == ["index,file,target,prediction,class_name,probability", "3,,0,1,,0.1875"]
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["a.csv"]


def test_images_without_a_known_order_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "gather_object", lambda own, parts: parts.__setitem__(slice(None), [own, own]))
    with pytest.warns(UserWarning, match="order is unknown to several processes"):
        write(tmp_path / "a.csv", [[-1], [-1]], others=[])
    assert indices(tmp_path / "a.csv") == [-1] * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_of_two_processes_writes_for_both(tmp_path, monkeypatch, rank):
    other = [((0, index), (index, 0, 0, 0.5)) for index in (1, 3)]

    def gather(own, parts):
        if parts is not None:
            parts[:] = [own, other]

    monkeypatch.setattr(dist, "gather_object", gather)
    write(tmp_path / "a.csv", [[0, 2], [4]], others=other, rank=rank)
    if rank == 0:
        assert indices(tmp_path / "a.csv") == [0, 1, 2, 3, 4]
    else:
        assert not (tmp_path / "a.csv").exists()
