"""Versions and hardware that a result depends on."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision

from ackd_lightning._version import __version__
from ackd_lightning.errors import count_of

_CPUINFO = Path("/proc/cpuinfo")  # of Linux


@functools.cache
def commit() -> str | None:
    """Return the git commit of this package's source, with ``+`` if files were changed; None if it is not known."""
    folder = Path(__file__).parents[1]  # the whole package

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if not git("ls-files", __file__):
            return None  # installed somewhere below another project's repository
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, by name."""
    source = commit()
    return {
        "ackd_lightning": __version__,
        **({"commit": source} if source else {}),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": version("timm"),
        "lightning": version("lightning"),
        "python": platform.python_version(),
    }


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the name of the processor."""
    lines = (line.partition(":") for line in _cpuinfo())
    named = next((value.strip() for key, _, value in lines if key.strip() == "model name"), "")
    return named or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Return the names of the processor's instructions as Linux knows them; empty elsewhere."""
    return set(next((line.split() for line in _cpuinfo() if line.startswith(("flags", "Features"))), []))


def _cpuinfo() -> tuple[str, ...]:
    if not _CPUINFO.is_file():
        return ()
    return tuple(_CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines())


def device_name(device: torch.device) -> str:
    """Return the name of the hardware.

    Args:
        device: Device of a training.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {count_of(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device)
