"""The program benchmarks/peers.py: the loops of the others, and the ratios."""

from __future__ import annotations

import copy
import json
import sys

import peer_loops
import peers
import pytest
import torch
from peer_loops import PEERS, Case, lacks

from ackd_lightning.models.zoo import create_model


@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("name", PEERS)
def test_every_side_trains_the_student_alone(name, monkeypatch):
    if lacks(name):
        pytest.skip(f"{name} needs {lacks(name)}")
    teacher, student = create_model("resnet14", 10).eval(), create_model("resnet8", 10)
    before = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    seen = []
    terms = peer_loops.kd_terms
    monkeypatch.setattr(peer_loops, "kd_terms", lambda *parts: seen.append(len(parts[0])) or terms(*parts))
    case = Case(teacher, student, classes=10, size=8, batch=4, workers=0, warmup=1, steps=2, device=torch.device("cpu"))
    assert PEERS[name](case) > 0
    assert int(student.state_dict()["bn1.num_batches_tracked"]) == 3
    assert not torch.equal(before[1]["conv1.weight"], student.state_dict()["conv1.weight"])
    assert all(torch.equal(value, teacher.state_dict()[key]) for key, value in before[0].items())
    assert seen == ([] if name == "torchdistill" else [4] * 3)


def pair(**speeds: float) -> dict:
    runs = {name: {"images_per_second": value} for name, value in speeds.items()}
    return {"runs": runs, "busy": False, "load_known": True}


def test_ours_is_compared_with_each_and_with_the_fastest_of_a_pair():
    found = peers.ratios([pair(loop=1, lightning=2, ours=8), pair(loop=3, lightning=2, ours=9)])
    assert found["loop"] == {"median": 5.5, "min": 3, "max": 8}
    assert found["the fastest"] == {"median": 3.5, "min": 3, "max": 4}


def test_sides_that_are_not_installed_are_left_out(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(peers, "lacks", lambda name: ["nothing"] if name == "trainer" else [])
    monkeypatch.setattr(peers, "run_peer", lambda name, options: asked.append(name) or speed_of(2.0))
    monkeypatch.setattr(
        peers, "run_ours", lambda method, options, settings: asked.append((method, *settings)) or speed_of(8.0)
    )
    given = ["--pairs", "1", "--peers", "loop,trainer", "--out", str(tmp_path / "raw.json"), "--fast"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *given])
    peers.main()
    assert asked == ["loop", ("kd", "--fast")]
    assert json.loads((tmp_path / "raw.json").read_text())["ratios"]["the fastest"]["median"] == 4
    assert "trainer" in capsys.readouterr().out


def speed_of(value: float) -> dict:
    return {"images_per_second": value, "load": {"busy": False}}
