"""Speed on this machine: the settings of ``--fast``, CUDA graphs, and an allocator that keeps freed memory."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import Method
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.runs.versions import cpu_flags
from ackd_lightning.types import ImageSize

Compile = bool | Literal["reduce-overhead"]
"""Whether networks are compiled; ``reduce-overhead`` runs them as CUDA graphs besides."""
GRAPHS = "reduce-overhead"
_MALLOPT = {-4: 0, -1: 2**31 - 1, -2: 2**28}
"""M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: no mapped blocks, no memory returned, and 256 MB requested at a time."""
_OWN = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")
_HALF = ("avx512_bf16", "amx_bf16", "bf16")  # flags of x86 and of Arm


def has_bfloat16(accelerator: str) -> bool:
    """Return whether the hardware computes faster in bfloat16 than in float32.

    Args:
        accelerator: Lightning's name of the accelerator; ``auto`` is a GPU if there is one.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(cpu_flags() & set(_HALF))


def has_compiler() -> bool:
    """Return whether torch finds the C++ compiler that it needs to compile networks."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def fast_settings(accelerator: str) -> dict[str, object]:
    """Return the settings of ``--fast`` by dotted name, with a warning for each that this machine does not support.

    Args:
        accelerator: Lightning's name of the accelerator.
    """
    settings: dict[str, object] = {"model.channels_last": True}
    if has_bfloat16(accelerator):
        settings["trainer.precision"] = "bf16-mixed"
    else:
        warnings.warn("--fast keeps float32, because this hardware has no bfloat16", stacklevel=2)
    if has_compiler():
        settings["model.compile"] = True
    else:
        warnings.warn("--fast does not compile networks, because there is no C++ compiler (install g++)", stacklevel=2)
    return settings


def speed_up(
    student: nn.Module,
    method: Method,
    teachers: Sequence[FrozenTeacher],
    *,
    input_size: ImageSize,
    channels_last: bool,
    compiles: Compile,
) -> None:
    """Change the memory layout of the networks and compile them, in place.

    Teachers that the method trains are not fused.

    Args:
        student: Student with its auxiliary learners.
        method: Method, which names its modules that are worth compiling.
        teachers: Loaded teachers.
        input_size: Side of the images in pixels, or their height and width.
        channels_last: Whether to lay out convolutions with channels last.
        compiles: Whether to compile, and how.
    """
    if compiles and method.teacher != "own":
        for teacher in teachers:
            teacher.fuse(input_size)
    if channels_last:
        for network in (student, method, *teachers):
            network.to(memory_format=torch.channels_last)
    if compiles:
        torch.compiler.reset()  # all students count towards one limit of graphs, after which torch compiles no more
        parts = [method.get_submodule(name) for name in method.compile_modules]
        mode = {} if isinstance(compiles, bool) else {"mode": compiles}
        for network in (student, *teachers, *parts):
            network.compile(dynamic=False, **mode)


def refuse_graphs(trainer: Any) -> None:
    """Refuse CUDA graphs where they cannot run, or where a gradient must outlive its step.

    The memory of a graph's outputs, gradients included, is used again in the next step.

    Args:
        trainer: Lightning's Trainer.

    Raises:
        ACKDError: Naming the setting.
    """
    device, batches = trainer.strategy.root_device.type, trainer.accumulate_grad_batches
    if device != "cuda":
        problem = f"the run is on {device}, where there are no CUDA graphs"
    elif torch.version.hip is not None:
        problem = "this GPU is not one of NVIDIA's"
    elif trainer.world_size > 1:
        problem = f"the run has {trainer.world_size} processes, with which CUDA graphs were not tried"
    elif batches > 1:
        problem = f"trainer.accumulate_grad_batches is {batches}, and a graph keeps no gradient from step to step"
    else:
        return
    raise ACKDError(f"model.compile is {GRAPHS} and {problem}; set model.compile to true")


def begin_step(compiles: Compile, device: torch.device) -> None:
    """Tell CUDA graphs that a step begins, so that the outputs of the step before may be overwritten.

    Without it, torch takes every call of a compiled network for a new step, and the student would overwrite what the
    teacher returned.

    Args:
        compiles: Whether networks are compiled, and how.
        device: Device that computes.
    """
    if compiles == GRAPHS and device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # untyped in torch


def keep_freed_memory() -> bool:
    """Let the C allocator of Linux keep freed memory for the next step instead of returning it to the system.

    All tensors of a training step on the CPU are freed at its end. By default glibc returns their memory and requests
    it again in the next step, page by page, which can take a third of the step. After this call the process never
    shrinks. Nothing is changed if the environment configures the allocator itself (``MALLOC_TOP_PAD_``,
    ``GLIBC_TUNABLES`` and the like).

    Returns:
        Whether the allocator accepted the settings; False with other C libraries.
    """
    named = {f"MALLOC_{name.upper()}_" for name in _OWN} & set(os.environ)
    tuned = any(f"glibc.malloc.{name}" in os.environ.get("GLIBC_TUNABLES", "") for name in _OWN)
    if named or tuned or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    taken = [library.mallopt(option, value) for option, value in _MALLOPT.items()]
    return all(taken)
