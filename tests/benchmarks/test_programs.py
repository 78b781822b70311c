"""Every program of benchmarks/ finds what it imports."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PROGRAMS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("path", PROGRAMS, ids=[path.stem for path in PROGRAMS])
def test_what_a_program_imports_exists(path):
    runpy.run_path(str(path))
