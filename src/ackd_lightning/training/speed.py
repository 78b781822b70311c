"""What makes a run fast on this machine: the settings that ``--fast`` stands for, and memory that is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import warnings
from pathlib import Path

import torch

_MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 2**28}
"""M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: no block of its own from the system, none back, and 256 MB at a time."""
_OWN = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")
_HALF = ("avx512_bf16", "amx_bf16", "bf16")  # flags of x86 and of Arm


def has_bfloat16(accelerator: str) -> bool:
    """Whether the hardware computes in bfloat16 faster than in float32.

    Args:
        accelerator: as Lightning names it; ``auto`` takes a GPU when there is one.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return False
    flags = next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return bool(set(flags.split()) & set(_HALF))


def has_compiler() -> bool:
    """Whether torch finds the C++ compiler that it needs for compiled networks."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def fast_settings(accelerator: str) -> dict[str, object]:
    """Settings by dotted name; a warning says which of them this machine cannot have.

    Args:
        accelerator: as Lightning names it.
    """
    settings: dict[str, object] = {"model.channels_last": True}
    if has_bfloat16(accelerator):
        settings["trainer.precision"] = "bf16-mixed"
    else:
        warnings.warn("--fast goes on in float32: this hardware has no bfloat16", stacklevel=2)
    if has_compiler():
        settings["model.compile"] = True
    else:
        warnings.warn("--fast goes on without compiled networks: there is no C++ compiler (g++)", stacklevel=2)
    return settings


def keep_freed_memory() -> bool:
    """Let the C allocator of Linux keep freed memory for the next step instead of giving it back to the system.

    All tensors of a training step on the CPU die at its end. By default glibc returns their memory and gets it again,
    page by page, in the next step; that can take a third of the step. From here on the process stays about as large as
    it was at most. Nothing is changed where the environment sets one of these things itself
    (``MALLOC_TOP_PAD_`` and its like, ``GLIBC_TUNABLES``).

    Returns:
        Whether the allocator took the settings; False with other C libraries.
    """
    named = {f"MALLOC_{name.upper()}_" for name in _OWN} & set(os.environ)
    tuned = any(f"glibc.malloc.{name}" in os.environ.get("GLIBC_TUNABLES", "") for name in _OWN)
    if named or tuned or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    taken = [library.mallopt(option, value) for option, value in _MALLOPT.items()]
    return all(taken)
