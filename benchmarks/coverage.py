"""Which networks can teach and learn: one training step of six methods for every torchvision name and timm family.

    python benchmarks/coverage.py --out coverage.jsonl              # hours on two cores; a second call resumes
    python benchmarks/coverage.py --only resnet18 timm:test_vit --out coverage.jsonl
    python benchmarks/coverage.py --table coverage.jsonl            # the table of docs/networks.md

Networks have fresh weights. Images are random, of 64 x 64 pixels or, where a network cannot read these, of its own
size. ``logits`` is a step of kd, ``features`` are steps of at, crd, reviewkd and simkd, ``branches`` is a step of ackd
with the paper's two auxiliary learners; each with the network as teacher of resnet8 and as student of resnet8.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.models import _registry
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import ACKD, AT, ATSC, CRD, KD, Method, ReviewKD
from ackd_lightning.models.branches import branch_names
from ackd_lightning.models.finding import native_sizes, plan_for, traced
from ackd_lightning.models.suffix import Cuts
from ackd_lightning.models.zoo import count_parameters, create_model
from ackd_lightning.testing import Harness, RandomImages

METHODS: dict[str, Callable[[], Method]] = {
    "kd": KD,
    "at": AT,
    "crd": lambda: CRD(negatives=4),
    "reviewkd": ReviewKD,
    "simkd": lambda: ATSC(adapt_teacher=False, classifier_update="none"),
    "ackd": ACKD,
}
GROUPS = {"logits": ("kd",), "features": ("at", "crd", "reviewkd", "simkd"), "branches": ("ackd",)}
CLASSES, BATCH = 5, 2


def names() -> Iterator[str]:
    """Yield every classification network of torchvision, and the smallest of each class of timm's networks."""
    yield from torchvision.models.list_models(module=torchvision.models)
    smallest: dict[tuple[str, str], tuple[int, str]] = {}
    for name in timm.list_models():
        try:
            with torch.device("meta"):
                network = timm.create_model(name, num_classes=CLASSES)
        except Exception:  # networks that make numbers in their constructors, or need a library
            continue
        if not hasattr(network, "num_classes") or not hasattr(network, "forward_head"):
            continue  # encoders without a classifier
        key = (_registry._model_to_module[name], type(network).__name__)
        size = count_parameters(network)
        if key not in smallest or size < smallest[key][0]:
            smallest[key] = (size, name)
    yield from sorted(f"timm:{name}" for _, name in smallest.values())


def image_size(network: nn.Module) -> int | tuple[int, int]:
    """Return 64 where a network can read it, or else the size that it was designed for."""
    return next((size for size in (64, *native_sizes(network)) if traced(network, size) is not None), 64)


def attempt(method: Callable[[], Method], student: nn.Module | str, teacher: nn.Module | str, size: Any) -> str | None:
    """Run one training step and return the sentence that refused it; None if all gradients are finite."""
    data = RandomImages(num_classes=CLASSES, input_size=size, count=4 * BATCH, batch_size=BATCH)
    try:
        harness = Harness(method(), student=student, teacher=teacher, data=data)
        loss = harness.step()
    except ACKDError as error:
        return str(error)
    except Exception as error:  # a raw error is what this program looks for
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    return None if bool(loss.isfinite()) else f"the loss is {float(loss)}"


def measure(name: str) -> dict[str, Any]:
    """Try a network as teacher and as student of every method."""
    started = time.perf_counter()
    network = create_model(name, CLASSES)
    size = image_size(network)
    row: dict[str, Any] = {"name": name, "parameters": count_parameters(network), "size": size, "steps": {}}
    plan = plan_for(network, size)
    points = {} if plan is None else dict(zip(branch_names(plan), reversed(plan.features[:-1]), strict=True))
    cuts = None if plan is None else Cuts(network, plan, size)
    row["points"] = {branch: cuts.difference(entry) for branch, entry in points.items() if cuts}
    for method, make in METHODS.items():
        row["steps"][method] = {
            "teacher": attempt(make, "resnet8", network, size),
            "student": attempt(make, copy.deepcopy(network), "resnet8", size),
        }
        gc.collect()
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def passed(row: dict[str, Any], group: str, role: str) -> bool:
    """Whether all methods of a group made a step."""
    return all(row["steps"][method][role] is None for method in GROUPS[group])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of docs/networks.md, with the first sentence for every network that does not do everything."""
    lines = ["| | networks | " + " | ".join(f"{group}: teacher, student" for group in GROUPS) + " | branch points |"]
    lines.append("|" + "---|" * (len(GROUPS) + 3))
    for library, chosen in (
        ("torchvision", [row for row in rows if not row["name"].startswith("timm:")]),
        ("timm", [row for row in rows if row["name"].startswith("timm:")]),
        ("all", rows),
    ):
        cells = []
        for group in GROUPS:
            counts = [sum(passed(row, group, role) for row in chosen) for role in ("teacher", "student")]
            cells.append(", ".join(f"{count} ({100 * count / max(len(chosen), 1):.0f} %)" for count in counts))
        works = sum(reason is None for row in chosen for reason in row["points"].values())
        total = sum(len(row["points"]) for row in chosen)
        lines.append(f"| {library} | {len(chosen)} | " + " | ".join(cells) + f" | {works} of {total} |")
    lines += ["", "| network | what does not work | sentence, the first of several |", "|---|---|---|"]
    for row in rows:
        failed = {
            f"{method} as {role}": reason
            for method, roles in row["steps"].items()
            for role, reason in roles.items()
            if reason is not None
        }
        if failed:
            lines.append(f"| {row['name']} | {', '.join(failed)} | {next(iter(failed.values()))} |")
    return "\n".join(lines)


def main() -> None:
    """Try the networks, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file with one line of JSON per network; networks that it holds are skipped")
    parser.add_argument("--only", nargs="+", help="names of networks; default: all")
    parser.add_argument("--table", help="print the table of a file instead")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(line) for line in Path(arguments.table).read_text(encoding="utf-8").splitlines()]))
        return
    warnings.filterwarnings("ignore")
    out = Path(arguments.out) if arguments.out else None
    done = set()
    if out is not None and out.is_file():
        done = {json.loads(line)["name"] for line in out.read_text(encoding="utf-8").splitlines()}
    for name in arguments.only or names():
        if name in done:
            continue
        row = measure(name)
        failed = sum(reason is not None for roles in row["steps"].values() for reason in roles.values())
        broken = [branch for branch, reason in row["points"].items() if reason is not None]
        print(
            f"{name}: {2 * len(METHODS) - failed} of {2 * len(METHODS)} steps, {len(row['points']) - len(broken)} of "
            f"{len(row['points'])} branch points, {row['seconds']} s",
            flush=True,
        )
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
