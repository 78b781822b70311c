"""Training speed of a configuration on this machine, where the time of a step goes, and memory.

    python benchmarks/bench.py --config NAME --methods kd,ackd

Every measurement runs in a fresh process, methods in turn (A B A B), while the load of other processes is watched. That
process builds the run as `ackd fit` does, without checkpoints and validation, and times three kinds of steps: through
the Trainer, as a bare loop of the same parts, and as that loop with a stopwatch around each part. Any other option is a
setting of `ackd fit`, such as --data.batch_size 64. README.md in this folder explains the numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from timing.machine import median_and_range, watched
from timing.training import PARTS, measure

from ackd_lightning.config.files import load_configs
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.runs.files import write_json

SUMMARISED = (
    "images_per_second",
    "step_seconds",
    "bare_images_per_second",
    "bare_step_seconds",
    "overhead",
    "data_share",
    "memory_bytes",
    "matrix_peak",
    "matrix_share",
    "busy_share",
)
"""Numbers of which median, minimum and maximum are shown."""


def _measured(arguments: Sequence[str], *, warmup: int, steps: int, trace: int) -> dict[str, Any]:
    """Measure one run in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="ackd-bench-") as folder:
        out = Path(folder) / "result.json"
        request = {"arguments": list(arguments), "warmup": warmup, "steps": steps, "trace": trace, "out": str(out)}
        done, load = watched([sys.executable, __file__, "--measure", json.dumps(request)])
        if not out.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"the measuring process ended with code {done.returncode}: {last}")
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if "error" in result:
        raise ACKDError(result["error"])
    return {**result, "load": load}


def answer(request: str) -> int:
    """Measure in this process, and write the numbers or the message of an error to a file.

    Args:
        request: JSON with ``arguments``, ``warmup``, ``steps`` and ``trace`` of ``measure``, and the file name ``out``.

    Returns:
        Exit code of the process.
    """
    asked = json.loads(request)
    try:
        result = measure(asked["arguments"], warmup=asked["warmup"], steps=asked["steps"], trace=asked["trace"])
    except ACKDError as error:
        result = {"error": str(error)}
    write_json(result, Path(asked["out"]))
    return 2 if "error" in result else 0


def summarised(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of one method, without disturbed runs if any run was undisturbed.

    Args:
        runs: Results of ``measure``, with ``load``.
    """
    quiet = [each for each in runs if not each["load"]["busy"]] or list(runs)
    known = [name for name in SUMMARISED if quiet[0].get(name) is not None]
    return {
        "runs": len(runs),
        "used": len(quiet),
        "disturbed": sum(bool(each["load"]["busy"]) for each in runs),
        **{name: median_and_range([each[name] for each in quiet]) for name in known},
        "parts": {part: median_and_range([each["parts"][part] for each in quiet]) for part in PARTS},
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
        f"{first['machine']['threads']} threads; {escape('median [min, max]')} of runs of {first['steps']} steps"
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
    row("share of it in use, %", lambda each: _cell(each["matrix_share"], 100))
    if any("busy_share" in each for each in methods.values()):
        row("GPU busy, % of the time", lambda each: _cell(each["busy_share"], 100))
    return table


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """Notes and warnings to print below the numbers."""
    lines = list(dict.fromkeys(note for each in report["runs"] for note in each["notes"]))
    loads = [each["load"] for each in report["runs"]]
    disturbed = [each for each in loads if each["busy"]]
    if disturbed:
        most = max(each["other_cores"] for each in disturbed)
        lines.append(
            f"WARNING: the machine was busy in {len(disturbed)} of {len(loads)} runs (other processes used up to "
            f"{most:.2f} of {disturbed[0]['cores']} cores): discard those times and repeat on an idle machine"
        )
    if any(each["busy"] is None for each in loads):
        lines.append(
            "WARNING: the load of other processes is unknown on this system; make sure that the machine is idle"
        )
    return lines


def bench(
    configs: Sequence[str],
    *,
    methods: Sequence[str] = (),
    steps: int = 20,
    warmup: int = 5,
    runs: int = 5,
    trace: int = 0,
    out: str | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the training speed of methods in turn, and print it.

    Args:
        configs: Values of ``--config``.
        methods: Method fragments, each merged over the configuration; none: the configuration's own method.
        steps: Number of timed steps of every run.
        warmup: Number of steps before them.
        runs: Number of fresh processes per method.
        trace: Number of steps after the timed ones whose kernels on a GPU are recorded.
        out: JSON file for all numbers; ``-``: standard output, in place of the table.
        overrides: Settings of ``ackd fit``.

    Returns:
        All numbers.

    Raises:
        ACKDError: When an argument is wrong.
    """
    if not configs:
        raise ACKDError("no configuration is given; name one with --config, `ackd configs` lists them")
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
            result = _measured(arguments, warmup=warmup, steps=steps, trace=trace)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: Command line without the program's name; None: that of the process.

    Returns:
        Exit code: 0, or 2 after a wrong argument.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", action="append", default=[], help="configuration, as for `ackd fit`")
    parser.add_argument("--methods", default="", help="methods, separated by commas; default: the configuration's own")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per run")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the timed ones")
    parser.add_argument("--runs", type=int, default=5, help="fresh processes per method, methods in turn")
    parser.add_argument(
        "--trace", type=int, default=0, help="further steps in which the busy share of a GPU is measured"
    )
    parser.add_argument(
        "--out", default=None, help="JSON file for all numbers; -: standard output instead of the table"
    )
    parser.add_argument("--measure", default=None, help=argparse.SUPPRESS)  # the fresh process of one measurement
    options, overrides = parser.parse_known_args(arguments)
    if options.measure is not None:
        return answer(options.measure)
    try:
        bench(
            options.config,
            methods=[name.strip() for name in options.methods.split(",") if name.strip()],
            steps=options.steps,
            warmup=options.warmup,
            runs=options.runs,
            trace=options.trace,
            out=options.out,
            overrides=overrides,
        )
    except ACKDError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
