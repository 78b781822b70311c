"""Execute the notebooks and keep their outputs: ``make notebooks``, or names of notebooks after this file's name."""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

LARGE = 30_000
"""Size in bytes above which a picture is kept with fewer colours."""


def small_png(data: str) -> str:
    """Return a PNG (base64), with as few colours as make it small."""
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    for colors in (256, 64, 32, 16):
        if len(data) * 3 / 4 <= LARGE:
            break
        buffer = io.BytesIO()
        picture.quantize(colors, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
    return data


def tidy(output: dict[str, Any]) -> None:
    """Keep one form of an output, without addresses in memory and escape sequences for colours."""
    found = output.get("data", {})
    if "image/png" in found:
        output["data"] = {"image/png": small_png(found["image/png"])}
        output["metadata"] = {}
    elif "text/html" in found:  # tables of rich, which are text as well
        output["data"] = {"text/plain": re.sub(r"\x1b\[[\d;]*m", "", found["text/plain"])}
        output["metadata"] = {}


def execute(path: Path) -> None:
    """Execute a notebook in an empty folder and write it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=where).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            tidy(output)
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",)} | {"language_info": {"name": "python"}}
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm would like ipywidgets, which Colab has
    here = Path(__file__).parent
    for each in sorted(here.glob("*.ipynb")):
        if len(sys.argv) == 1 or each.stem in sys.argv[1:]:
            execute(each)
