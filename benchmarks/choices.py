"""Alternative implementations, compared for speed.

    python benchmarks/choices.py

The teacher's forward pass in bfloat16 with channels last: unchanged, with BatchNorm fused into the convolutions,
compiled, fused and compiled (what --fast does), and compiled with frozen weights. One step of SGD on the student:
torch's three implementations.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from ackd_lightning.models.folding import folded
from timing.machine import cpu_model
from torch import nn

from ackd_lightning.models.zoo import create_model
from ackd_lightning.training.speed import keep_freed_memory


def measured(ways: dict[str, Callable[[], object]], repeats: int) -> None:
    """Print median, minimum and maximum of every alternative, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 3):
        for name, call in ways.items():
            begin = time.perf_counter()
            call()
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - begin))
    for name, values in times.items():
        print(f"  {name:<34} {statistics.median(values):8.2f} ms  [{min(values):.2f}, {max(values):.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    teacher = create_model("resnet110", 100)
    with torch.no_grad():
        for _ in range(20):
            teacher.train()(images[:16])  # fresh weights need BatchNorm statistics
    plain = teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    inside = folded(plain, lambda network: [network(images[:2])])
    assert isinstance(inside, nn.Module)
    networks = {"unchanged": plain, "BatchNorm fused": inside}
    for name, network, arguments in (
        ("compiled", plain, {}),
        ("BatchNorm fused, compiled", inside, {}),
        ("compiled, weights frozen", plain, {"options": {"freezing": True}}),
    ):
        networks[name] = copy.deepcopy(network)
        networks[name].compile(dynamic=False, **arguments)

    def forward(network: nn.Module) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return network(images)

    print(f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch_size}")
    print("resnet110, forward, bfloat16")
    measured({name: lambda each=each: forward(each) for name, each in networks.items()}, options.repeats)
    exact = plain(images)
    for name, network in networks.items():
        error = float((forward(network).float() - exact).norm() / exact.norm())
        print(f"  {name:<34} {error:8.2%} from float32")
    print("SGD over resnet20, one step")
    steps = {}
    for name in ("foreach", "fused", "for loop"):
        student = create_model("resnet20", 100)
        for parameter in student.parameters():
            parameter.grad = torch.randn_like(parameter)
        way = {name: True} if name != "for loop" else {"foreach": False}
        steps[name] = torch.optim.SGD(student.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4, **way).step
    measured(steps, options.repeats)


if __name__ == "__main__":
    main()
