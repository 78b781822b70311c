"""What ``--fast`` stands for on this machine."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch

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
