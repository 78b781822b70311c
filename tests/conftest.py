from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

sys.path.insert(0, str(Path(__file__).parent))  # helpers of the tests

from ackd_lightning.callbacks.figures import draw_figures as _DRAW

os.environ.setdefault("WANDB_MODE", "offline")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU on a machine without one."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch):
    """No seed, run name, folder, rank, silence or service of Weights & Biases of one test may reach the next."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "ACKD_RUN_NAME", "ACKD_DEBUG", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    yield
    logging.disable(logging.NOTSET)
    logging.getLogger("ackd_lightning.data").disabled = False
    logging.getLogger().setLevel(logging.WARNING)
    rank_zero_only.rank = 0  # a Trainer that thinks it is another process sets it, which silences the next test


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny networks gain nothing from threads, and the processes of a test run share the cores."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def _no_figures():
    """Runs of the tests draw nothing, which would take longer than most of them; those of ``figures`` do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ackd_lightning.callbacks.figures.draw_figures", lambda folder: None)
        yield


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch):
    """Let the runs of this test draw their figures."""
    monkeypatch.setattr("ackd_lightning.callbacks.figures.draw_figures", _DRAW)
