"""Training on a GPU: half precision, NCCL, no waiting for the device, and CUDA graphs."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
import torch.distributed as dist

from ackd_lightning.methods import ACKD, AT, CRD, KD
from training.helpers import IndexedBlobs, game, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # advice of torch's compiler and of Lightning about the machine
]
METHODS = [KD, AT, ACKD, lambda: CRD(negatives=16)]
NAMES = ["kd", "at", "ackd", "crd"]


class Losses(L.Callback):
    """Loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(trainer.callback_metrics["train/loss_step"]))


def losses(make, *, compiles=False, **options) -> list[float]:
    """Losses of two epochs with validation, the same images and weights in every call."""
    seen = Losses()
    net = game(make(), lr=0.01, compile=compiles)
    trainer(accelerator="gpu", callbacks=[seen], **options).fit(net, datamodule=IndexedBlobs())
    assert len(seen.values) == 16
    assert all(each.isfinite().all() for each in net.state_dict().values())
    return seen.values


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("make", METHODS, ids=NAMES)
def test_half_precision_follows_float32(make, precision):
    found, expected = losses(make, precision=precision), losses(make)
    assert found[0] == pytest.approx(expected[0], rel=0.1)  # later on rounding has changed the weights


def test_one_process_with_nccl_trains_as_none():
    try:
        found = losses(ACKD, strategy="ddp")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert found == pytest.approx(losses(ACKD), rel=1e-3)


class Strict(L.Callback):
    """Let torch raise an error where the second and the third step wait for the device."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in (1, 2):
            self.steps += 1
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", METHODS, ids=NAMES)
def test_torch_itself_finds_no_wait_in_a_step(make):
    strict = Strict()
    options = {"max_steps": 5, "limit_val_batches": 0, "log_every_n_steps": 1000}
    net = game(make(), lr=0.01)
    trainer(accelerator="gpu", callbacks=[strict], **options).fit(net, datamodule=IndexedBlobs())
    assert strict.steps == 2


@pytest.mark.slow
@pytest.mark.parametrize("make", METHODS, ids=NAMES)
def test_cuda_graphs_compute_what_compiled_networks_compute(make):
    torch._dynamo.reset()
    expected = losses(make, compiles=True)
    torch._dynamo.reset()
    assert losses(make, compiles="reduce-overhead") == pytest.approx(expected, rel=1e-3)
