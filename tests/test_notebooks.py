"""Every notebook runs from top to bottom, and is kept with outputs that are small and say nothing about a machine."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
SMALL = {"PER_CLASS": 4, "EPOCHS": 1}
"""Names that a notebook sets in one of its first cells, and what they are here."""
PICTURE, NOTEBOOK = 60_000, 300_000
"""Largest sizes in bytes."""


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
def test_it_is_a_notebook_with_clean_outputs(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    assert path.stat().st_size <= NOTEBOOK
    for cell in content["cells"]:
        assert set(cell) >= {"cell_type", "metadata", "source"}
        assert cell["metadata"] == {}
    ids = [cell["id"] for cell in content["cells"]]
    assert len(set(ids)) == len(ids)
    assert [cell["execution_count"] for cell in code_cells(path)] == list(range(1, len(code_cells(path)) + 1))
    outputs = [output for cell in code_cells(path) for output in cell["outputs"]]
    assert not [each for each in outputs if each["output_type"] == "error" or each.get("name") == "stderr"]
    pictures = [each["data"].pop("image/png") for each in outputs if "image/png" in each.get("data", {})]
    assert pictures
    assert max(len(base64.b64decode(each)) for each in pictures) <= PICTURE
    assert not re.findall(r"(?<![\w.])(?:/work|/home|/tmp|/root|/Users|/content|[A-Z]:\\)\b.*", json.dumps(outputs))


@every_notebook
@pytest.mark.usefixtures("figures")  # a notebook shows those of its runs
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")  # Lightning's advice; data in memory needs none
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(path)):
        source = smaller("".join(cell["source"]))
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)
    plt.close("all")
