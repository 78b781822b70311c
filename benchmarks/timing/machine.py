"""What a measured time depends on: the machine, the load of other processes, and the machine's peak speed."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ackd_lightning.runs.versions import cpu_flags, versions

BUSY = 0.05
"""Share of the machine's cores that other processes may use before a run counts as disturbed."""
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices whose product measures the machine's peak speed."""
_ENVIRONMENT = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "OMP_", "MKL_", "KMP_", "PYTORCH_")


def median_and_range(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum.

    Args:
        values: At least one number.
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _cpu_seconds() -> tuple[float, int] | None:
    """Busy seconds of all cores since the machine started, and the number of cores; None where this is unknown."""
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, lines[0].split()[1:9])
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), cores


def watched(command: Sequence[str], **options: Any) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run a command and measure the load of other processes meanwhile.

    Args:
        command: Program and arguments.
        options: Keyword arguments of ``subprocess.run``.

    Returns:
        The completed process and the load. ``other_cores`` is the mean number of the machine's ``cores`` that were
        busy with anything but this process and its children; ``busy`` says whether that is too much. Both are None
        where they are unknown.
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


def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 matrices in tiles (AMX)."""
    return "amx_tile" in cpu_flags()


def machine() -> dict[str, Any]:
    """Versions, hardware, number of threads, and the environment variables that change speed."""
    return {
        "versions": versions(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_ENVIRONMENT)},
    }


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; a CPU needs no waiting.

    Args:
        device: Device that computes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def busy_share(spans: Sequence[tuple[float, float]]) -> float | None:
    """Share of the time from the first start to the last end in which something runs; None without spans.

    Args:
        spans: Start and end of every kernel and copy, in any order; they may overlap.
    """
    if not spans:
        return None
    ordered = sorted(spans)
    first, reached = ordered[0]
    busy = reached - first
    for start, end in ordered[1:]:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - first) if reached > first else None


def matrix_peak(device: torch.device, dtype: torch.dtype, *, side: int, repeats: int = 5) -> float:
    """Operations per second of a large matrix product (two per multiply-add), the best of several.

    Args:
        device: Device that computes.
        dtype: Number format of the matrices.
        side: Side of the square matrices.
        repeats: Number of timed products.
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
    """Number format of a run's matrix products.

    Args:
        precision: Precision of the Trainer, such as ``bf16-mixed``.
    """
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return kinds.get(precision.partition("-")[0], torch.float32)


def resident_bytes() -> int | None:
    """Peak resident memory of this process, without its worker processes; None on Windows."""
    if sys.platform == "win32":
        return None
    # Linux passes ru_maxrss of the parent on to a new process; only this line belongs to the process itself
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
