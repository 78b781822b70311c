"""Load of other processes, peak memory and peak speed."""

from __future__ import annotations

import sys

import pytest
import torch
from timing import machine
from timing.machine import matrix_peak, matrix_type, resident_bytes, watched


def test_the_largest_memory_is_at_least_that_of_now():
    size = resident_bytes()
    assert size is None or size > 2**26
    assert matrix_peak(torch.device("cpu"), torch.float32, side=8, repeats=1) > 0


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("64-true", torch.float64),
    ],
)
def test_the_matrix_has_the_precision_of_the_run(precision, dtype):
    assert matrix_type(precision) == dtype


def test_load_of_others_is_that_of_the_machine_without_ours(monkeypatch):
    told = iter([(100.0, 4), (103.0, 4)])
    monkeypatch.setattr(machine, "_cpu_seconds", lambda: next(told))
    moments = iter([10.0, 20.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(moments))
    own = iter([(1.0, 0.0, 2.0, 0.0, 0.0), (1.5, 0.0, 3.5, 0.0, 0.0)])
    monkeypatch.setattr(machine.os, "times", lambda: next(own))
    monkeypatch.setattr(machine.subprocess, "run", lambda command, **options: command)
    done, load = watched(["command"])
    assert done == ["command"]
    assert load == {"seconds": 10.0, "cores": 4, "own_cores": 0.2, "other_cores": pytest.approx(0.1), "busy": False}


@pytest.mark.parametrize(("others", "busy"), [(0.19, False), (0.21, True), (-1.0, False)])
def test_one_core_in_twenty_may_be_busy(others, busy, monkeypatch):
    told = iter([(0.0, 4), (100 * others, 4)])
    monkeypatch.setattr(machine, "_cpu_seconds", lambda: next(told))
    moments = iter([0.0, 100.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(moments))
    monkeypatch.setattr(machine.os, "times", lambda: (0.0,) * 5)
    monkeypatch.setattr(machine.subprocess, "run", lambda command, **options: command)
    load = watched(["command"])[1]
    assert load["busy"] is busy
    assert load["other_cores"] == pytest.approx(max(0.0, others))


def test_unknown_load_is_not_called_idle(monkeypatch):
    monkeypatch.setattr(machine, "_cpu_seconds", lambda: None)
    done, load = watched([sys.executable, "-c", "print(1)"])
    assert done.stdout == "1\n"
    assert (load["busy"], load["other_cores"]) == (None, None)
