"""Started by test_methods_ddp.py, once for each process: three steps of every method on equal global batches.

Process r of W takes the images r, r + W, ... of the batch, as samplers deal them out, and gradients are averaged, as
DDP does it. Networks have no BatchNorm, and that of a method normalises nothing: its statistics are a process's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from ackd_lightning.config.files import config_folder, read_config
from ackd_lightning.functional import cross_entropy, whole_batch
from ackd_lightning.methods import AdversarialMethod, Method
from ackd_lightning.methods.base import from_description
from ackd_lightning.models.features import probe
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.types import Batch, NetOutput
from training.helpers import CLASSES, SIZE, TinyNet

IMAGES, STEPS = 8, 3
TARGETS = torch.arange(40) % CLASSES


class Spread(Method):
    """Variance of the logits over the batch: of the global one, or, wrongly, of each process's part."""

    needs_teacher = False

    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.gather = gather

    def weights(self) -> dict[str, float]:
        return {"ce": 1.0, "spread": 1.0}

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        logits, index = student.logits, batch.index
        if self.gather:
            logits, index = whole_batch(logits), whole_batch(index)
        spread = (logits * index[:, None]).var(dim=0).sum()  # the index tells whether both came in the same order
        return {"ce": cross_entropy(student.logits, batch.target), "spread": spread}


def methods():
    for path in sorted((config_folder() / "methods").glob("*.yaml")):
        yield path.stem, from_description(read_config(path)["model"]["init_args"]["method"])
    yield "right", Spread(True)
    yield "wrong", Spread(False)


def averaged_gradients(modules: dict[str, nn.Module], world: int) -> dict[str, Tensor]:
    """Means over the processes, by name; the gradients are taken away."""
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


def run(method: Method, world: int, rank: int) -> list[dict[str, Tensor]]:
    """Gradients and memories of every step."""
    torch.manual_seed(0)
    teacher, student = FrozenTeacher(TinyNet(8, norm=False)), BranchyStudent(TinyNet(norm=False), method.branches)
    teachers = [teacher] if method.needs_teacher else []
    method.set_range([-2.0] * 3, [2.0] * 3)
    method.teacher_specs = tuple(probe(each.network, SIZE) for each in teachers)
    method.attach(student, [each.network for each in teachers])
    method.build(probe(student, SIZE), method.teacher_specs[0] if teachers else None)
    method.adopt(teachers)
    method.set_total_epochs(100)
    method.set_batch_size(IMAGES)
    method.set_epoch(49)
    method.set_epoch(50)
    if method.needs_targets:
        method.set_targets(TARGETS)
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # and with statistics that were not kept:
            module.running_mean, module.running_var = torch.zeros_like(module.weight), torch.ones_like(module.weight)
    modules: dict[str, nn.Module] = {"student": student, "method": method}
    generator = torch.Generator().manual_seed(1)
    steps = []
    for _ in range(STEPS):
        index = torch.randperm(len(TARGETS), generator=generator)[:IMAGES]
        image = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator)
        part = slice(rank, None, world)
        batch = Batch(image[part], TARGETS[index[part]], index[part])
        output = student(batch.image)
        taught = teacher(batch.image) if method.needs_teacher and not method.takes_teachers else None
        weights, terms = method.weights(), method(output, taught, batch)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        with torch.no_grad():
            method.observe(output, taught, batch)
        loss.backward()
        result = averaged_gradients(modules, world)
        for player in method.players() if isinstance(method, AdversarialMethod) else ():
            method.player_loss(player, student(batch.image), taught, batch)[0].backward()
            result |= {f"{player} of {name}": each for name, each in averaged_gradients(modules, world).items()}
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
