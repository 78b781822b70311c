"""What a measured time depends on: the machine, what others do on it, and what it can do."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ackd_lightning.runs.versions import versions

BUSY = 0.05
"""Share of the machine's cores that other processes may use before a run counts as disturbed."""
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices whose product shows what the machine can do."""
_ENVIRONMENT = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "PYTORCH_")


def _cpu_seconds() -> tuple[float, int] | None:
    """Seconds that all cores together have worked since the machine started, and their number; None if not told."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, lines[0].split()[1:9])
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), cores


def watched(command: Sequence[str], **options: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run a command to its end and tell what other processes did meanwhile.

    Args:
        command: program and arguments.
        options: for ``subprocess.run``.

    Returns:
        What the command left, and the load: ``other_cores`` is how many of the machine's ``cores`` were busy on
        average with anything but this process and its children, ``busy`` whether that is too much; None if unknown.
    """
    before, started, spent = _cpu_seconds(), time.monotonic(), sum(os.times()[:4])
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    after, seconds, own = _cpu_seconds(), time.monotonic() - started, sum(os.times()[:4]) - spent
    load: dict[str, Any] = {"seconds": seconds, "cores": None, "own_cores": own / seconds}
    if before is None or after is None:
        return done, {**load, "other_cores": None, "busy": None}
    others = max(0.0, after[0] - before[0] - own) / seconds
    return done, {**load, "cores": after[1], "other_cores": others, "busy": others > BUSY * after[1]}


def cpu_model() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a measured time depends on: versions, hardware, threads, and settings in the environment."""
    return {
        "versions": versions(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_ENVIRONMENT)},
    }


def wait(device: torch.device) -> None:
    """Let a GPU come to the end of what it was given.

    Args:
        device: that computes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_peak(device: torch.device, dtype: torch.dtype, *, side: int, repeats: int = 5) -> float:
    """Operations per second (two for each multiply-add) of a large matrix product, the best of some.

    Args:
        device: that computes.
        dtype: of the matrices.
        side: of the square matrices.
        repeats: how many are timed.
    """
    first = torch.randn(side, side, device=device).to(dtype)
    second = torch.randn(side, side, device=device).to(dtype)
    times = []
    for _ in range(repeats + 1):
        wait(device)
        begin = time.perf_counter()
        torch.matmul(first, second)
        wait(device)
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / min(times[1:])


def matrix_type(precision: str) -> torch.dtype:
    """Number format of the matrix products of a run.

    Args:
        precision: of the Trainer.
    """
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return kinds.get(precision.partition("-")[0], torch.float32)


def resident_bytes() -> int | None:
    """Largest memory that this process has had so far, its worker processes' not counted; None on Windows."""
    if sys.platform == "win32":
        return None
    # Linux hands ru_maxrss of the parent on to a new process: only this line is its own
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
