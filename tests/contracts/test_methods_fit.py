"""Methods that learn something about the data from the fit: a run, its checkpoint, going on, and loading it alone."""

from __future__ import annotations

import pytest
import torch

from ackd_lightning import DistillationModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import CRD, SemCKD
from training.helpers import CLASSES, SIZE, Blobs, IndexedBlobs, TinyNet, largest_difference, state, trainer


def module(method: CRD | SemCKD) -> DistillationModule:
    torch.manual_seed(0)
    options = {"teacher_gate": "off", "input_size": SIZE, "lr": 0.05, "milestones": [2]}
    return DistillationModule(TinyNet(), CLASSES, method=method, teacher=TinyNet(8), **options)


@pytest.mark.parametrize("make", [lambda: CRD(negatives=16), SemCKD], ids=["crd", "semckd"])
def test_a_run_goes_on_bit_for_bit_and_loads_without_data(tmp_path, make):
    whole = module(make())
    trainer(max_epochs=2).fit(whole, datamodule=IndexedBlobs())

    first = module(make())
    run = trainer(max_epochs=1)
    run.fit(first, datamodule=IndexedBlobs())
    run.save_checkpoint(tmp_path / "first.ckpt")
    second = module(make())
    trainer(max_epochs=2).fit(second, datamodule=IndexedBlobs(), ckpt_path=tmp_path / "first.ckpt")
    assert largest_difference(state(whole), state(second)) == 0.0

    alone = DistillationModule.load_from_checkpoint(
        tmp_path / "first.ckpt", student=TinyNet(), teacher=TinyNet(8), weights_only=True
    )
    assert largest_difference(state(first), state(alone)) == 0.0


@pytest.mark.parametrize(
    ("method", "sentence"),
    [(CRD(), "give the data module an attribute `train_targets`"), (SemCKD(), "does not know the batch size")],
    ids=["crd", "semckd"],
)
def test_data_that_do_not_tell_are_refused(method, sentence):
    with pytest.raises(ACKDError, match=sentence):
        trainer(max_epochs=1).fit(module(method), datamodule=Blobs())
