"""``ackd doctor``: what is installed, what this machine has, and whether it can train."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from rich.table import Table

from ackd_lightning._version import __version__
from ackd_lightning.config.files import config_folder
from ackd_lightning.errors import ACKDError, NotReadyError, first_line
from ackd_lightning.runs.console import show_table

_US = "ackd-lightning"
_LITTLE_DISK = 2e9
_MAINTAINERS = {"dev", "notebooks", "release"}
"""Extras that only work on this package needs."""


def doctor(*, as_json: bool = False) -> None:
    """Print versions, devices, space, extras, and whether a step of training works.

    Args:
        as_json: Whether to print JSON instead of a table.

    Raises:
        NotReadyError: If the package cannot train here, with the remedy.
    """
    found: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    found["versions"] = _versions(problems)
    works = _torch_works(problems)
    found["devices"] = {**_processor(), **(_accelerators(problems) if works else {})}
    found["machine"] = _machine(problems)
    found["extras"] = _extras()
    if works:
        found["training"] = {"weights & biases": _wandb(), "one step": _one_step(problems)}
    if as_json:
        print(json.dumps({**found, "problems": problems}, indent=1))
    else:
        _show(found)
    if problems:
        raise NotReadyError(f"training does not work here: {'; '.join(problems)}")
    if not as_json:
        print("training works here; next: ackd init FOLDER for your own images, or ackd demo")


def _show(found: dict[str, dict[str, str]]) -> None:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column()
    for part, entries in found.items():
        for number, (name, value) in enumerate(entries.items()):
            table.add_row("" if number else part, name, value, end_section=number == len(entries) - 1)
    show_table(table)


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """Every requirement of this package for this Python, and the extra that it belongs to; empty for none."""
    with contextlib.suppress(PackageNotFoundError):
        for text in requires(_US) or []:
            each = Requirement(text)
            extra = str(each.marker).partition("extra == ")[2].strip("'\"") if each.marker else ""
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                yield each, extra


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fits(requirement: Requirement) -> bool:
    there = _installed(requirement.name)
    return there is not None and requirement.specifier.contains(there, prereleases=True)


def _versions(problems: list[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), _US: __version__}
    needed = [each for each, extra in _requirements() if not extra]
    for each in needed:
        there = _installed(each.name)
        found[each.name] = (there or "missing") + ("" if _fits(each) else f" (needs {each.specifier})")
        if not _fits(each):
            state = "is not installed" if there is None else f"is {there}"
            problems.append(f"{each.name} {state} and {each.specifier} is needed; run: pip install '{each}'")
    if not needed:  # a folder on PYTHONPATH
        found[_US] += ", not installed by pip, so that its requirements are not known"
    return found


def _torch_works(problems: list[str]) -> bool:
    for name in ("torch", "torchvision", "lightning"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation fails in any way
            reason = first_line(error)
            problems.append(
                f"{name} cannot be imported ({reason}); install torch and torchvision of one release: "
                "pip install --force-reinstall torch torchvision"
            )
            return False
    return True


def _processor() -> dict[str, str]:
    from ackd_lightning.runs.versions import cpu_flags, cpu_name, processors

    fast = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "bf16", "sve"} & cpu_flags())
    cores = processors()
    allowed = "" if cores == os.cpu_count() else f" ({os.cpu_count()} in the machine)"
    return {"CPU": f"{cpu_name()}, {cores} cores{allowed}", "instructions": ", ".join(fast) or "none that matter here"}


def _accelerators(problems: list[str]) -> dict[str, str]:
    import torch

    from ackd_lightning.training.speed import has_bfloat16

    found, asked = {}, "auto"
    for number in range(torch.cuda.device_count()):
        try:
            about = torch.cuda.get_device_properties(number)
            free = torch.cuda.mem_get_info(number)[0]
            found[f"GPU {number}"] = f"{about.name}, {about.total_memory / 1e9:.1f} GB ({free / 1e9:.1f} GB free)"
        except RuntimeError as error:  # a broken driver, or a GPU that another process has for itself
            reason = first_line(error, 300)
            found[f"GPU {number}"] = f"cannot be used ({reason})"
            asked = "cpu"
            problems.append(f"GPU {number} cannot be used ({reason}); free it, or set CUDA_VISIBLE_DEVICES without it")
    found["bfloat16"] = "fast" if has_bfloat16(asked) else "not faster than float32 here"
    if not torch.cuda.device_count():
        found["GPU"] = "none that torch finds"
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            found["GPU"] += "; there is a driver of NVIDIA and this build of torch has no CUDA: see pytorch.org"
    if torch.backends.mps.is_available():
        found["MPS"] = "Apple's GPU"
    return found


def _machine(problems: list[str]) -> dict[str, str]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = {"folder": f"{here}, {free / 1e9:.1f} GB free" + (" (little)" if free < _LITTLE_DISK else "")}
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        problems.append(f"{here} cannot be written ({error.strerror}); go to a folder of your own")
    pages = Path("/proc/meminfo")
    if pages.is_file():
        sizes = dict(line.split(":", 1) for line in pages.read_text(encoding="utf-8").splitlines() if ":" in line)
        total, left = (int(sizes.get(name, "0").split()[0]) / 1e6 for name in ("MemTotal", "MemAvailable"))
        found["memory"] = f"{total:.1f} GB ({left:.1f} GB available)"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None)
    found["C++ compiler"] = compiler or "none: --fast does not compile networks; install g++"
    return found


def _extras() -> dict[str, str]:
    parts: dict[str, list[Requirement]] = {}
    for each, extra in _requirements():
        if extra and extra not in _MAINTAINERS and each.name != _US:
            parts.setdefault(extra, []).append(each)
    found: dict[str, str] = {}
    for extra, needed in sorted(parts.items()):
        have = [f"{each.name} {_installed(each.name)}" for each in needed]
        whole = all(map(_fits, needed))
        found[extra] = ", ".join(have) if whole else f"missing; pip install '{_US}[{extra}]'"
    return found


def _wandb() -> str:
    from ackd_lightning.callbacks.wandb import offline

    return "no key: --wandb logs to the disk (offline)" if offline() else "key found"


def _one_step(problems: list[str]) -> str:
    """Run one step of `ackd fit` with a teacher and a student, which writes nothing in the current folder."""
    started, output = time.monotonic(), io.StringIO()
    try:
        from ackd_lightning.launch.execute import run
        from ackd_lightning.models.weights import save_weights
        from ackd_lightning.models.zoo import create_model

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            teacher = Path(folder) / "teacher.safetensors"
            save_weights(create_model("resnet20", 10), teacher)
            options = ["--model.teacher.weights", str(teacher), "--model.teacher.gate", "off"]
            options += ["--trainer.fast_dev_run", "1", "--trainer.enable_progress_bar", "false"]
            options += ["--trainer.devices", "1"]  # other processes would start the whole command again
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                run("fit", ["--config", str(config_folder() / "digits_resnet20_resnet8.yaml"), *options])
    except Exception as error:
        if os.environ.get("ACKD_DEBUG"):
            raise
        reason = (str(error).splitlines() or [""])[0]
        name = "" if isinstance(error, ACKDError) else f"{type(error).__name__}: "
        problems.append(f"one step of training failed ({name}{reason}); ACKD_DEBUG=1 ackd doctor shows where")
        return "failed"
    return f"teacher, student and ACKD on digits: works ({time.monotonic() - started:.1f} s)"
