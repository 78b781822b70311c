"""The example of docs/export.md runs without this package and agrees with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ackd_lightning import load_student
from ackd_lightning.runs.export import export_student
from deploy.samples import checkpoint

ORIENTATION = 0x0112
PAGE = Path(__file__).parents[2] / "docs/export.md"


@pytest.mark.slow
def test_the_plain_example_predicts_as_load_student(tmp_path):
    plain = {"channels": 3, "crop_pct": 0.875, "interpolation": "bilinear", "background": "white", "pixels": "uint8"}
    checkpoint(tmp_path / "a.ckpt", "timm:test_byobnet", input_size=32, preprocessing=plain)
    export_student(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    pixels = np.random.default_rng(3).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=turned)
    (code,) = re.findall(r"<!-- plain.py -->\n```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert "ackd" not in code
    code = f"{code.rstrip()}\nprint(network(images).softmax(1).tolist())\n"
    (tmp_path / "plain.py").write_text(f"import sys; sys.modules['ackd_lightning'] = None\n{code}")
    command = [sys.executable, "plain.py", "a.safetensors", "a.jpg"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    names, probabilities = load_student(tmp_path / "a.safetensors").predict(tmp_path / "a.jpg")
    assert shown[0] == names[0]
    assert np.allclose(eval(shown[1]), probabilities.detach().numpy(), atol=1e-5)
