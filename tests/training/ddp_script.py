"""Started by test_ddp.py: the same fits with one or two processes; rank 0 saves weights, metrics and buffers."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
from ackd_lightning import ACKD, KD, ACKDModule, StudentConfig
from ackd_lightning.callbacks.predictions import PredictionFile
from ackd_lightning.errors import NonFiniteError
from ackd_lightning.methods import ACN, AIKD, ATSC, VID
from ackd_lightning.training import DOT, Recipe
from training.helpers import BadImages, Blobs, IndexedBlobs, TinyNet, game, module, trainer

TWO_ONLY = ("unequal", "norm", "never_rearmed", "skip", "skip_automatic", "skip_accumulated", "val_accumulated", "qat")
"""Scenarios of two processes that are not compared with one process."""


class Differences(L.Callback):
    """Keep the largest difference between two processes of BatchNorm's buffers in validation, and of all weights."""

    def __init__(self):
        self.buffers = self.weights = 0.0

    @staticmethod
    def difference(trainer, tensors):
        if trainer.world_size == 1:
            return 0.0
        mine = torch.cat([torch.zeros(1).double(), *(each.detach().double().flatten() for each in tensors)])
        every = [torch.zeros_like(mine) for _ in range(trainer.world_size)]
        dist.all_gather(every, mine)
        return float((every[0] - every[1]).abs().max())

    def on_validation_epoch_end(self, trainer, pl_module):
        self.buffers = max(self.buffers, self.difference(trainer, pl_module.student.buffers()))

    def on_train_end(self, trainer, pl_module):
        self.weights = self.difference(trainer, pl_module.parameters())


class UnequalStart(L.Callback):
    """Give one process other discriminators."""

    def setup(self, trainer, pl_module, stage):
        if trainer.global_rank == 1:
            for parameter in pl_module.method.discriminators.parameters():
                parameter.data.add_(1.0)


class NeverRearmed(ACKDModule):
    def rearm_buffer_broadcast(self):
        pass


def without_norm(net):
    """Remove BatchNorm from the projectors: without sync_batchnorm every process has its own statistics."""
    for projector in net.method.head.projectors:
        for number, layer in enumerate(projector):
            if isinstance(layer, torch.nn.BatchNorm2d):
                projector[number] = torch.nn.Identity()
    return net


def scenarios():
    strong = {"discriminator_lr": 0.1}
    yield "default", module(ACKD(**strong), norm=False), []
    yield "diversify", module(ACKD(adversarial="diversify", teach="both", **strong), norm=False), []
    yield "collaboration", module(ACKD(adversarial="off", attention="off"), norm=False), []
    yield "unequal", module(ACKD(**strong), norm=False), [UnequalStart()]
    yield "norm", module(ACKD(**strong)), []
    yield "atsc", without_norm(game(ATSC(classifier_lr=0.05), norm=False)), []
    yield "simkd", without_norm(game(ATSC(adapt_teacher=False, classifier_update="none"), norm=False)), []
    yield "aikd", game(AIKD(discriminator_lr=1e-2), norm=False), []
    yield "pskd", game(AIKD(previous="table", weight_det=0.0, weight_adv=0.0), norm=False), []
    yield "acn", game(ACN(warmup_epochs=1), norm=False), []
    adamw = functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-3)  # with less, rounding can switch a ReLU
    yield "adamw", module(ACKD(**strong), norm=False, optimizer=adamw), []
    dot = functools.partial(DOT, lr=0.05, momentum=0.9, weight_decay=5e-4)
    yield "dot", game(VID(), norm=False, optimizer=dot, recipe=Recipe(gradient_clip_val=1.0)), []
    recipe = Recipe(label_smoothing=0.1, class_weights=[0.5, 1.0, 2.0, 4.0], ema_decay=0.9, early_stopping=1)
    yield "recipe", game(KD(), norm=False, recipe=recipe), []
    # the bad image is in one process's part of the batch
    yield "skip", module(ACKD(**strong), on_nonfinite="skip"), []
    yield "skip_automatic", game(KD(), on_nonfinite="skip"), []
    yield "skip_accumulated", game(KD(), on_nonfinite="skip"), []  # its last batch
    yield "val_accumulated", game(KD()), []  # in the middle of it
    yield "qat", game(KD(), student=StudentConfig(TinyNet(), quantization="x86")), []
    yield "gate", game(KD(), gate="warn"), []  # measures the teacher on the images of both processes
    yield "never_rearmed", module(ACKD(**strong), kind=NeverRearmed), []


def main(devices: int, out: Path) -> None:
    for name, net, callbacks in scenarios():
        if devices == 1 and name in TWO_ONLY:
            continue
        apart = Differences()
        parallel = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
        sums = {"accumulate_grad_batches": 2} if name.endswith("_accumulated") else {}
        sums |= {"val_check_interval": 1} if name == "val_accumulated" else {}
        run = trainer(callbacks=[apart, *callbacks], limit_train_batches=5, **sums, **parallel)
        images = BadImages() if name.startswith("skip") else Blobs() if isinstance(net, ACKDModule) else IndexedBlobs()
        run.fit(net, datamodule=images)
        if run.is_global_zero:
            measured = [each.metadata.get("measured_acc") for each in net.teachers.frozen]
            metrics = {key: float(value) for key, value in run.callback_metrics.items()}
            result = {"state": net.state_dict(), "metrics": metrics, "steps": run.global_step}
            result |= {
                "measured": measured,
                "buffers": apart.buffers,
                "weights": apart.weights,
                "skipped": net.guard.skipped,
            }
            torch.save(result, out / f"{name}-{devices}.pt")
    evaluate(devices, out)
    if devices > 1:
        stop(devices, out)


class OddBlobs(Blobs):
    """27 images without an index, which two processes cannot share evenly; none is repeated."""

    def test_dataloader(self):
        data, trainer = self._data(1, 27), self.trainer
        return DataLoader(data, batch_size=4, sampler=range(trainer.global_rank, 27, trainer.world_size))

    def predict_dataloader(self):
        return DataLoader(self._data(1, 27), batch_size=4)


def evaluate(devices: int, out: Path) -> None:
    """Test and predict images that two processes cannot share evenly."""
    run = trainer(devices=devices, strategy="ddp" if devices > 1 else "auto", use_distributed_sampler=False)
    torch.manual_seed(0)
    (metrics,) = run.test(module(ACKD()), datamodule=OddBlobs(), verbose=False)
    if run.is_global_zero:
        torch.save(metrics, out / f"test-{devices}.pt")
    torch.manual_seed(0)
    writer = PredictionFile(out / f"predictions-{devices}.csv")
    trainer(devices=devices, strategy="ddp" if devices > 1 else "auto", callbacks=[writer]).predict(
        module(ACKD()), datamodule=OddBlobs()
    )


def stop(devices: int, out: Path) -> None:
    """Write what each process says of a loss that is not finite in one of them."""
    run = trainer(limit_train_batches=5, devices=devices, strategy="ddp")
    try:
        run.fit(module(ACKD()), datamodule=BadImages())
    except NonFiniteError as error:
        (out / f"stop-{run.global_rank}.txt").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
