from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning calls what is deprecated


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny networks are many times slower with two threads on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
