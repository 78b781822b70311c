"""Two processes equal one, for every method in ``configs/methods``: gradients of three steps, and memories."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ackd_lightning.config.files import config_folder

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
NAMES = [path.stem for path in sorted((config_folder() / "methods").glob("*.yaml"))]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return ``found(name, processes, rank)``: what ddp_methods.py saved of a method's steps."""
    folder = tmp_path_factory.mktemp("ddp")
    script = Path(__file__).with_name("ddp_methods.py")
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(world), str(rank), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
        )
        for world, rank in ((2, 0), (2, 1), (1, 0))
    ]
    try:
        for each in started:
            _, errors = each.communicate(timeout=240)
            assert each.returncode == 0, errors[-3000:]
    finally:
        for each in started:
            each.kill()
    results = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    return lambda name, world, rank=0: results[f"{world}-{rank}"][name]


def largest_difference(first: list, second: list) -> float:
    """Return the largest over steps and tensors, relative to the tensor's (or 1/1000 of the step's) largest entry."""
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        floor = 1e-3 * max(float(value.abs().max()) for key, value in one.items() if not key.startswith("buffer "))
        for key, value in one.items():
            if value.numel():
                difference = float((value.double() - other[key].double()).abs().max())
                largest = max(largest, difference / max(floor, float(value.abs().max())))
    return largest


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(found, name):
    one, two = found(name, 1), found(name, 2)
    assert any(key.startswith("student.") for key in one[0])
    assert largest_difference(one, two) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_memories_are_equal_in_both_processes(found, name):
    for first, second in zip(found(name, 2, 0), found(name, 2, 1), strict=True):
        for key in first:
            if key.startswith("buffer "):
                assert torch.equal(first[key], second[key]), key


def test_a_gathered_batch_keeps_its_gradient(found):
    assert largest_difference(found("right", 1), found("right", 2)) < 1e-5


def test_a_method_that_reads_its_own_part_only_is_found(found):
    assert largest_difference(found("wrong", 1), found("wrong", 2)) > 1e-2
