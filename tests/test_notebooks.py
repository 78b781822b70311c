"""Every notebook runs from top to bottom, and none is kept with outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SMALL = {"PER_CLASS": 4, "EPOCHS": 1}
"""Names that a notebook may set in its first cell, and what they are here."""


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def smaller(source: str) -> str:
    """Replace the sizes in a line such as ``PER_CLASS, EPOCHS = 10, 2``."""
    names = ", ".join(SMALL)
    return re.sub(rf"^{names} = .*$", f"{names} = {', '.join(map(str, SMALL.values()))}", source, flags=re.MULTILINE)


def test_there_are_notebooks():
    assert NOTEBOOKS


@every_notebook
def test_it_is_a_notebook_without_outputs(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    for cell in content["cells"]:
        assert set(cell) >= {"cell_type", "metadata", "source"}
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in code_cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@every_notebook
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # Lightning's advice; data in memory needs none
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(path)):
        source = smaller("".join(cell["source"]))
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)
