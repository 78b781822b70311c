"""Started by test_methods_ddp.py, once for each process: three steps of every method on equal global batches.

Process r of W gets the images r, r + W, ... of the batch, as from a distributed sampler, and gradients are averaged, as
by DDP. Networks have no BatchNorm, and that of a method normalises nothing: every process has its own statistics.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from ackd_lightning import DistillationModule
from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.functional import cross_entropy, whole_batch
from ackd_lightning.methods import FitInfo, Method
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.methods.description import from_description
from ackd_lightning.models.freezing import frozen
from ackd_lightning.types import Batch, NetOutput
from training.helpers import CLASSES, SIZE, game

IMAGES, STEPS = 8, 3
TARGETS = torch.arange(40) % CLASSES


class Variance(Method):
    """Variance of the logits over the batch: of the global one, or, wrongly, of each process's part."""

    teacher = "none"

    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.gather, self.loss_weights = gather, {"ce": 1.0, "variance": 1.0}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        logits, index = student.logits, batch.index
        if self.gather:
            logits, index = whole_batch(logits), whole_batch(index)
        variance = (logits * index[:, None]).var(dim=0).sum()  # the index shows whether both have the same order
        return {"ce": cross_entropy(student.logits, batch.target), "variance": variance}


def methods():
    for path in sorted((config_folder() / "methods").glob("*.yaml")):
        yield path.stem, from_description(read_config(path)["model"]["method"])
    yield "right", Variance(True)
    yield "wrong", Variance(False)


def averaged_gradients(modules: dict[str, nn.Module], world: int) -> dict[str, Tensor]:
    """Return means over the processes by name, and remove the gradients."""
    found = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters(prefix=prefix):
            if parameter.grad is None:
                continue
            if world > 1:
                dist.all_reduce(parameter.grad)
            found[name] = parameter.grad / world
            parameter.grad = None
    return found


def prepared(method: Method) -> DistillationModule:
    """Build the training module of a method, in the middle of a fit."""
    module = game(method, norm=False)
    method.begin_fit(FitInfo(epochs=100, batch_size=IMAGES, targets=TARGETS, seed=0, teachers=module.teachers.frozen))
    for epoch in (49, 50):
        method.set_epoch(epoch)
    for layer in method.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
            layer.running_mean, layer.running_var = torch.zeros_like(layer.weight), torch.ones_like(layer.weight)
    return module


def run(method: Method, world: int, rank: int) -> list[dict[str, Tensor]]:
    """Return gradients and memories of every step."""
    module = prepared(method)
    modules: dict[str, nn.Module] = {"student": module.student, "method": method}
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(STEPS):
        index = torch.randperm(len(TARGETS), generator=generator)[:IMAGES]
        image = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
        part = slice(rank, None, world)
        batch = Batch(image[part], TARGETS[index[part]], index[part])
        result = {}
        for name in module.auxiliary:
            loss = method.auxiliary_loss(name, *module.outputs(batch), batch)
            assert loss is not None
            loss[0].backward()
            result |= {f"{name} of {key}": each for key, each in averaged_gradients(modules, world).items()}
        outputs = module.outputs(batch)
        with frozen(each for parameters in module.auxiliary.values() for each in parameters):
            weighted_loss(method, method(*outputs, batch)).backward()
        with torch.no_grad():
            method.update(*outputs, batch)
        result |= averaged_gradients(modules, world)
        result |= {f"buffer {name}": each.clone() for name, each in method.named_buffers()}
        steps.append(result)
    return steps


def main(world: int, rank: int, folder: Path) -> None:
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=world, rank=rank)
    torch.save({name: run(method, world, rank) for name, method in methods()}, folder / f"{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
