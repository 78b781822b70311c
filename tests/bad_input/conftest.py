from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from ackd_lightning import create_model
from ackd_lightning.cli import main
from ackd_lightning.models.weights import save_weights

TEACHER = Path("weights/digits_resnet20.safetensors")
RUN = Path("runs/digits_resnet20/t")
QUICK = ["--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "1"]
QUICK += ["--data.max_per_class", "4", "--data.batch_size", "20"]


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with one finished run (resnet8 on digits) and a teacher of random weights; tests copy it."""
    folder = tmp_path_factory.mktemp("made")
    before = Path.cwd()
    os.chdir(folder)
    try:
        name = ["--name", RUN.name, "--weights_dir", "null", "--model.student", "resnet8"]
        assert main(["fit", "--config", "digits_resnet20.yaml", *name, *QUICK]) == 0
        save_weights(create_model("resnet20", 10), TEACHER)
    finally:
        os.chdir(before)
        os.environ.pop("ACKD_RUN_NAME", None)
        os.environ.pop("PL_GLOBAL_SEED", None)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(here, made):
    """The working folder with a copy of what is in ``made``."""
    shutil.copytree(made, here, dirs_exist_ok=True)
    return here
