"""Started by test_ddp.py: the same fits with one or two processes; rank 0 saves weights, metrics and buffers."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from ackd_lightning import ACKD, KD, ACKDModule
from ackd_lightning.methods import ACN, AIKD, ATSC
from training.helpers import Blobs, IndexedBlobs, game, module, trainer


class Buffers(L.Callback):
    """Keep the largest difference of BatchNorm's buffers between two processes in validation."""

    def __init__(self):
        self.largest = 0.0

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.world_size == 1:
            return
        mine = torch.cat([torch.zeros(1).double(), *(each.double().flatten() for each in pl_module.student.buffers())])
        every = [torch.zeros_like(mine) for _ in range(trainer.world_size)]
        dist.all_gather(every, mine)
        self.largest = max(self.largest, float((every[0] - every[1]).abs().max()))


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
    adamw = functools.partial(torch.optim.AdamW, lr=0.01, eps=1e-4)
    yield "adamw", module(ACKD(**strong), norm=False, optimizer=adamw), []
    yield "adamw_automatic", game(KD(), norm=False, optimizer=adamw), []
    yield "never_rearmed", module(ACKD(**strong), kind=NeverRearmed), []


def main(devices: int, out: Path) -> None:
    for name, net, callbacks in scenarios():
        buffers = Buffers()
        run = trainer(devices=devices, strategy="ddp" if devices > 1 else "auto", callbacks=[buffers, *callbacks])
        run.fit(net, datamodule=Blobs() if isinstance(net, ACKDModule) else IndexedBlobs())
        if run.is_global_zero:
            metrics = {key: float(value) for key, value in run.callback_metrics.items()}
            result = {"state": net.state_dict(), "metrics": metrics, "buffers": buffers.largest}
            torch.save({**result, "steps": run.global_step}, out / f"{name}-{devices}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
