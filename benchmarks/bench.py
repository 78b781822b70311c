"""All measurements, one after the other, and what they come to."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ackd_lightning.bench.machine import watched
from ackd_lightning.bench.measuring import PARTS
from ackd_lightning.config.files import load_configs
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.runs.files import write_json

_SPREAD = (
    "images_per_second",
    "step_seconds",
    "bare_images_per_second",
    "bare_step_seconds",
    "overhead",
    "data_share",
    "memory_bytes",
    "matrix_peak",
    "matrix_share",
)
"""Numbers of which median, least and largest are shown."""


def _measured(arguments: Sequence[str], *, warmup: int, steps: int) -> dict[str, Any]:
    """Measure one run in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="ackd-bench-") as folder:
        out = Path(folder) / "result.json"
        request = {"arguments": list(arguments), "warmup": warmup, "steps": steps, "out": str(out)}
        code = "import sys; from ackd_lightning.bench.measuring import answer; sys.exit(answer(sys.argv[1]))"
        done, load = watched([sys.executable, "-c", code, json.dumps(request)])
        if not out.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the measuring process ended with code {done.returncode}: {last}")
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if "error" in result:
        raise ACKDError(result["error"])
    return {**result, "load": load}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of some numbers.

    Args:
        values: at least one.
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarised(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of one method; over the undisturbed ones, where there are any.

    Args:
        runs: as ``measure`` gives them, with ``load``.
    """
    quiet = [each for each in runs if not each["load"]["busy"]] or list(runs)
    known = [name for name in _SPREAD if quiet[0][name] is not None]
    return {
        "runs": len(runs),
        "used": len(quiet),
        "disturbed": sum(bool(each["load"]["busy"]) for each in runs),
        **{name: spread([each[name] for each in quiet]) for name in known},
        "parts": {part: spread([each["parts"][part] for each in quiet]) for part in PARTS},
        "multiply_adds": quiet[0]["multiply_adds"],
    }


def _cell(values: Mapping[str, float], scale: float = 1.0, digits: int = 1) -> str:
    shown = [f"{scale * values[key]:,.{digits}f}" for key in ("median", "min", "max")]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _table(report: Mapping[str, Any]) -> Table:
    first = report["runs"][0]
    where = first["machine"]["gpu"] if first["device"].startswith("cuda") else first["machine"]["cpu"]
    table = Table(
        caption=f"{report['config']}, batch {first['batch_size']}, {first['precision']}, {where}, "
        f"{first['machine']['threads']} threads; {escape('median [least, largest]')} of runs of {first['steps']} steps"
    )
    table.add_column("")
    methods: Mapping[str, Any] = report["methods"]
    for name in methods:
        table.add_column(name, justify="right")

    def row(label: str, cell: Callable[[Any], str]) -> None:
        table.add_row(label, *map(cell, methods.values()))

    row("images/s, Trainer", lambda each: _cell(each["images_per_second"]))
    row("images/s, bare loop", lambda each: _cell(each["bare_images_per_second"]))
    row("step, Trainer, ms", lambda each: _cell(each["step_seconds"], 1e3))
    row("step, bare loop, ms", lambda each: _cell(each["bare_step_seconds"], 1e3))
    row("Trainer above bare loop, %", lambda each: _cell(each["overhead"], 100))
    for part, label in PARTS.items():
        row(f"  {label}, ms", lambda each, part=part: _cell(each["parts"][part], 1e3, 2))  # type: ignore[misc]
    row("data, % of the bare step", lambda each: _cell(each["data_share"], 100))
    kind = first["memory_kind"]
    row(
        f"peak memory, {kind}, MB",
        lambda each: _cell(each["memory_bytes"], 1e-6, 0) if "memory_bytes" in each else "unknown",
    )
    for network, label in (("teacher", "teacher"), ("student", "student"), ("in_training", "student in training")):
        row(f"multiply-adds, {label}, M", lambda each, key=network: f"{each['multiply_adds'][key] / 1e6:,.1f}")  # type: ignore[misc]
    row("matrix product, Gop/s", lambda each: _cell(each["matrix_peak"], 1e-9, 0))
    row("share of it that is used, %", lambda each: _cell(each["matrix_share"], 100))
    return table


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """What has to be said beside the numbers."""
    lines = list(dict.fromkeys(note for each in report["runs"] for note in each["notes"]))
    loads = [each["load"] for each in report["runs"]]
    disturbed = [each for each in loads if each["busy"]]
    if disturbed:
        most = max(each["other_cores"] for each in disturbed)
        lines.append(
            f"WARNING: the machine was busy in {len(disturbed)} of {len(loads)} runs (other processes used up to "
            f"{most:.2f} of {disturbed[0]['cores']} cores): those times mean nothing; repeat them on an idle machine"
        )
    if any(each["busy"] is None for each in loads):
        lines.append("WARNING: this system does not tell what other processes do; see that they do nothing")
    return lines


def bench(
    configs: Sequence[str],
    *,
    methods: Sequence[str] = (),
    steps: int = 20,
    warmup: int = 5,
    runs: int = 5,
    out: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the training speed of methods, methods in turn, and show it.

    Args:
        configs: what stands behind ``--config``.
        methods: fragments, each laid over the configuration; none: the configuration's own method.
        steps: that are timed in every run.
        warmup: steps before them.
        runs: fresh processes for each method.
        out: file for all numbers as JSON; ``-`` for standard output, in place of the table.
        overrides: settings of ``ackd fit``.

    Returns:
        All numbers.

    Raises:
        ACKDError: for whatever is wrong with the arguments.
    """
    if not configs:
        raise ACKDError("ackd bench has no configuration; name one with --config, `ackd configs` lists them")
    for name, number in (("steps", steps), ("warmup", warmup), ("runs", runs)):
        if number < 1:
            raise ACKDError(f"--{name} is {number}; use 1 or more")
    if len(set(methods)) < len(methods):
        raise ACKDError(f"--methods names a method twice ({', '.join(methods)}); name each once")
    for method in methods:
        load_configs([*configs, method])
    config = load_configs(configs)[1]
    to_screen = out == "-"
    file = Path(out) if out is not None and not to_screen else None
    if file is not None and file.exists():
        raise ACKDError(f"--out {file} exists; choose another file")
    if file is not None:
        check_writable(file.parent, "the folder of --out,")
    results: list[dict[str, Any]] = []
    for number in range(runs):
        for method in methods or [""]:
            layers = [*configs, *([method] if method else [])]
            arguments = [part for layer in layers for part in ("--config", layer)] + list(overrides)
            result = _measured(arguments, warmup=warmup, steps=steps)
            name = method or result["method"].lower()
            results.append({"name": name, "run": number, **result})
            load = result["load"]
            print(
                f"[{number + 1}/{runs}] {name}: {result['images_per_second']:,.1f} images/s"
                + (f", DISTURBED by {load['other_cores']:.2f} cores of other load" if load["busy"] else ""),
                file=sys.stderr,
                flush=True,
            )
    names = list(dict.fromkeys(each["name"] for each in results))
    report = {
        "config": config,
        "overrides": list(overrides),
        "measured": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "busy": any(each["load"]["busy"] for each in results),
        "methods": {name: summarised([each for each in results if each["name"] == name]) for name in names},
        "runs": results,
    }
    if to_screen:
        print(json.dumps(report, indent=2))
        return report
    Console(width=None if Console().is_terminal else 140).print(_table(report))
    for line in _warnings(report):
        print(line)
    if file is not None:
        write_json(report, file)
        print(f"all numbers: {file}")
    return report
