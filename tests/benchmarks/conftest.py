from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # the programs are not part of the package


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
    from timing import machine

    for kind in machine.MATRIX:
        monkeypatch.setitem(machine.MATRIX, kind, 32)
    monkeypatch.chdir(tmp_path)
