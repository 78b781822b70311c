"""Methods that learn something about the data from the fit: train, resume from a checkpoint, load it without data."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ackd_lightning import DistillationModule, TeacherConfig
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import CRD, Method, SemCKD
from ackd_lightning.models.zoo import create_model
from ackd_lightning.testing import Harness, RandomImages


def harness(method: Method) -> Harness:
    data = RandomImages(num_classes=4, input_size=16, count=32, batch_size=8)
    return Harness(method, teacher="resnet8", data=data, lr=0.05)


def trainer(epochs: int) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, **quiet)


def assert_equal(first: DistillationModule, second: DistillationModule) -> None:
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("make", [lambda: CRD(negatives=16), SemCKD], ids=["crd", "semckd"])
def test_a_run_resumes_bit_for_bit_and_loads_without_data(tmp_path, make):
    whole = harness(make())
    trainer(2).fit(whole.module, datamodule=whole.data)

    first = harness(make())
    run = trainer(1)
    run.fit(first.module, datamodule=first.data)
    run.save_checkpoint(tmp_path / "first.ckpt")
    second = harness(make())
    trainer(2).fit(second.module, datamodule=second.data, ckpt_path=tmp_path / "first.ckpt")
    assert_equal(whole.module, second.module)

    alone = DistillationModule.load_from_checkpoint(
        tmp_path / "first.ckpt",
        student=create_model("resnet8", 4),
        teacher=TeacherConfig(network=create_model("resnet8", 4), gate="off"),
        weights_only=True,
    )
    assert_equal(first.module, alone)


@pytest.mark.parametrize(
    ("method", "named"), [(CRD(), "`train_targets`"), (SemCKD(), "`batch_size`")], ids=["crd", "semckd"]
)
def test_data_without_what_the_method_needs_are_refused(method, named):
    here = harness(method)
    loader = DataLoader(TensorDataset(here.data.images, here.data.train_targets), batch_size=8)
    with pytest.raises(ACKDError, match=named):
        trainer(1).fit(here.module, loader, loader)
