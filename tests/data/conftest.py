"""Small data sets on disk for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def no_global_seed(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


def make_picture(seed: int, size: int | tuple[int, int] = 32) -> Image.Image:
    width, height = (size, size) if isinstance(size, int) else size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def picture():
    return make_picture


@pytest.fixture
def write_classes():
    """Write a folder of class folders, given the number of images of each class."""

    def write(root: Path, classes: dict[str, int], *, size=32, suffix=".png", seed=0) -> Path:
        for label, (name, count) in enumerate(sorted(classes.items())):
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                make_picture(seed + 1000 * label + number, size).save(root / name / f"{number:04d}{suffix}")
        return root

    return write


@pytest.fixture
def folder(tmp_path, write_classes):
    """A folder with 2 classes: 20 + 12 training and 4 + 4 test images of 32 x 32."""
    write_classes(tmp_path / "set" / "train", {"cat": 20, "dog": 12})
    write_classes(tmp_path / "set" / "test", {"cat": 4, "dog": 4}, seed=50_000)
    return tmp_path / "set"
