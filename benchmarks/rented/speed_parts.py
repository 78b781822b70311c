"""Part 1: the machine and the tests marked gpu. Part 2: speed, memory and busy share of a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rented.record import Task

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
GPU_TESTS = (
    "tests/training/test_gpu.py",
    "tests/training/test_nonfinite.py",
    "tests/data/test_base.py",
    "tests/data/test_class_order.py",
    "tests/data/test_transforms.py",
)
PAIRS = {
    "resnet110_resnet20": "cifar100_resnet110_resnet20.yaml",
    "resnet50_resnet18": "tinyimagenet_resnet50_resnet18.yaml",
}
TINY = {"digits": "digits_resnet20_resnet8.yaml"}
GRAPHS = ("--fast", "--model.compile", "reduce-overhead")
WAYS = {"eager": (), "fast": ("--fast",), "graphs": GRAPHS}
"""Settings of our side: as it comes, compiled in bfloat16, and as CUDA graphs besides."""
ROWS = (
    ("kd", "fast"),
    ("ackd", "fast"),
    ("kd", "graphs"),
    ("ackd", "graphs"),
    ("crd", "fast"),
    ("crd", "graphs"),
    ("kd_cached", "fast"),
    ("kd_cached", "graphs"),
    ("kd", "eager"),
    ("ackd", "eager"),
    ("crd", "eager"),
)
"""Methods and ways in the order of their importance."""


def process(command: Sequence[str], left: float) -> subprocess.CompletedProcess[str]:
    """Run a program until it ends or the time is over.

    Raises:
        RuntimeError: If it fails, with the end of its output.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done


# ---------------------------------------------------------------- part 1


def machine_facts(left: float) -> dict[str, Any]:
    """Card, memory, formats, peak of matrix products, free disk, versions."""
    import torch
    from timing.machine import MATRIX, machine, matrix_peak

    facts: dict[str, Any] = {**machine(), "free_disk": shutil.disk_usage(tempfile.gettempdir()).free}
    note = ROOT / "commit.txt"
    facts["commit"] = note.read_text(encoding="utf-8") if note.is_file() else None
    if not torch.cuda.is_available():
        return {**facts, "cuda": None}
    device, card = torch.device("cuda"), torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    torch.backends.cuda.matmul.allow_tf32 = False
    peaks = {str(kind): matrix_peak(device, kind, side=MATRIX["cuda"]) for kind in (torch.float32, torch.bfloat16)}
    torch.backends.cuda.matmul.allow_tf32 = True
    peaks["tf32"] = matrix_peak(device, torch.float32, side=MATRIX["cuda"])
    return {
        **facts,
        "cuda": torch.version.cuda,
        "cards": torch.cuda.device_count(),
        "capability": [card.major, card.minor],
        "memory": {"free": free, "total": total},
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        "nccl": torch.distributed.is_nccl_available(),
        "matrix_peak": peaks,
    }


def gpu_tests(marks: str, left: float) -> dict[str, Any]:
    """Outcome of every test with some marks."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *GPU_TESTS, "-m", marks, "-q", f"--junitxml={report}"]
        command += ["-p", "no:cacheprovider", "-o", "filterwarnings=default"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=left, cwd=ROOT)
        if not report.is_file():
            raise RuntimeError(done.stdout[-1500:] + done.stderr[-500:])
        outcomes: dict[str, str] = {}
        for case in ET.parse(report).iter("testcase"):
            found = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
            outcome = "passed" if found is None else f"{found.tag}: {(found.text or found.get('message') or '')[-600:]}"
            outcomes[f"{case.get('classname')}.{case.get('name')}"] = outcome
    words = [each.partition(":")[0] for each in outcomes.values()]
    return {"counts": {word: words.count(word) for word in sorted(set(words))}, "tests": outcomes}


def first_part() -> Iterator[Task]:
    """Check of the machine, then the tests, the slow ones apart."""
    yield Task(1, "machine", "machine", 40, machine_facts)
    yield Task(1, "tests", "tests", 150, partial(gpu_tests, "gpu and not slow"))
    yield Task(1, "tests of graphs", "slow tests", 240, partial(gpu_tests, "gpu and slow"))


# ---------------------------------------------------------------- part 2


def plain(config: str, batch: int, steps: int, tf32: bool, left: float) -> dict[str, Any]:
    """The plain KD loop on ready images."""
    request = {"config": config, "method": "kd", "batch_size": batch, "warmup": 10, "steps": steps, "tf32": tf32}
    done = process([sys.executable, str(BENCHMARKS / "speed.py"), "--plain", json.dumps(request)], left)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def loop(config: str, batch: int, steps: int, workers: int, left: float) -> dict[str, Any]:
    """The usual KD loop with torchvision's transforms in worker processes."""
    request = {"config": config, "name": "loop", "batch_size": batch, "warmup": 20, "steps": steps, "workers": workers}
    done = process([sys.executable, str(BENCHMARKS / "peers.py"), "--peer", json.dumps(request)], left)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ours(config: str, batch: int, steps: int, method: str, settings: Sequence[str], left: float) -> dict[str, Any]:
    """Our side through the Trainer, with a trace of some steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        cached = ("--model.teacher.cache", f"{folder}/cache") if method.endswith("_cached") else ()
        command = [sys.executable, str(BENCHMARKS / "bench.py"), "--config", config]
        command += [
            "--methods",
            method.removesuffix("_cached"),
            "--steps",
            str(steps),
            "--warmup",
            str(max(2, steps // 2)),
        ]
        command += ["--trace", str(max(2, steps // 4)), "--runs", "1", "--out", str(out)]
        process([*command, "--data.batch_size", str(batch), *settings, *cached], left)
        return dict(json.loads(out.read_text(encoding="utf-8"))["runs"][0])


def second_part(*, tiny: bool) -> Iterator[Task]:
    """Speed of every pair and batch size: the loops of others, then our methods."""
    pairs, batches, steps, workers = (TINY, (8,), 2, 1) if tiny else (PAIRS, (128, 512), 60, 8)
    rows = [row for row in ROWS if row[1] == "eager" and row[0] == "kd"] if tiny else ROWS
    for batch in batches:
        for pair, config in pairs.items():
            where = f"{pair} batch {batch}"
            yield Task(2, f"{where}: plain float32", "plain", 40, partial(plain, config, batch, steps, False))
            yield Task(2, f"{where}: plain tf32", "plain", 40, partial(plain, config, batch, steps, True))
            yield Task(2, f"{where}: loop with loader", "loop", 60, partial(loop, config, batch, steps, workers))
            small = ("--data.max_per_class", "4") if tiny else ()
            for method, way in rows:
                kind, settings = f"{pair} {way}", (*WAYS[way], *small)
                estimate = {"eager": 60, "fast": 120, "graphs": 120}[way]
                run = partial(ours, config, batch, steps, method, settings)
                yield Task(2, f"{where}: {method} {way}", kind, estimate, run)
