"""Our training speed and that of a plain eager float32 loop of the same networks, in pairs, on an idle machine.

    python benchmarks/speed.py --pairs 5 --fast --malloc tuned

Every pair runs the plain KD loop, then bench.py with KD, ACKD, CRD, and KD with the teacher's logits from a cache, each
in a fresh process (A B A B over the pairs). A pair with load of other processes is discarded and repeated. Any other
option is a setting of `ackd fit` for our side, such as --fast. README.md in this folder explains the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing.machine import has_amx, machine, median_and_range, resident_bytes, watched

from ackd_lightning.config.files import load_configs
from ackd_lightning.models.zoo import create_model
from ackd_lightning.runs.files import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
"""Settings with which glibc keeps freed memory instead of returning it in every step."""
ALLOCATOR = {
    "glibc": "glibc's default; `ackd fit` keeps freed memory by itself, the plain loop does not",
    "tuned": "keeps freed memory on both sides",
    "inherit": "set by the environment",
}
CACHED = "_cached"
"""End of the name of a row of ours whose teacher's logits come from a cache."""
LEAST_PLAIN = 200.0
"""Images per second that the plain KD loop must reach on the machine of the goals to be a fair baseline."""


# ---------------------------------------------------------------- the plain loop


def plain_loop(
    method: str,
    *,
    teacher: torch.nn.Module | None,
    student: torch.nn.Module,
    num_classes: int,
    size: int,
    batch_size: int,
    warmup: int,
    steps: int,
    tf32: bool = False,
) -> float:
    """Mean seconds of a step of the usual loop: images in memory, float32, nothing fused, means read in every step.

    On a GPU ``tf32`` lets torch round products to TF32, which it does by itself in convolutions alone.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    batches = [
        (torch.randn(batch_size, 3, size, size).to(device), torch.randint(num_classes, (batch_size,)).to(device))
        for _ in range(8)
    ]
    student.to(device).train()
    if teacher is not None:
        with torch.no_grad():  # without BatchNorm statistics the outputs of fresh weights overflow
            teacher.to(device).train()
            for _ in range(20):
                teacher(batches[0][0][:16])
        teacher.eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    loss_sum = top1_sum = top5_sum = seen = 0.0
    begin = 0.0
    for step in range(warmup + steps):
        if step == warmup:
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
        image, target = batches[step % len(batches)]
        logits = student(image)
        loss = F.cross_entropy(logits, target)
        if method == "kd":
            with torch.no_grad():
                soft = F.softmax(teacher(image) / 4.0, dim=1)
            distilled = F.kl_div(F.log_softmax(logits / 4.0, dim=1), soft, reduction="sum") * 4.0**2 / batch_size
            loss = 0.1 * loss + 0.9 * distilled
        right = logits.topk(5, dim=1).indices == target[:, None]
        loss_sum += loss.item() * batch_size
        top1_sum += right[:, 0].float().sum().item()
        top5_sum += right.any(dim=1).float().sum().item()
        seen += batch_size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def plain(request: dict) -> dict:
    """Measure the plain loop in this process, on the networks of a configuration."""
    settings = load_configs([request["config"]])[0]
    model, data = settings["model"], pkgutil.resolve_name(settings["data"]["class_path"])
    torch.manual_seed(0)
    seconds = plain_loop(
        request["method"],
        teacher=create_model(model["teacher"]["network"], data.num_classes) if request["method"] == "kd" else None,
        student=create_model(model["student"], data.num_classes),
        num_classes=data.num_classes,
        size=data.input_size,
        batch_size=request["batch_size"],
        warmup=request["warmup"],
        steps=request["steps"],
        tf32=request.get("tf32", False),
    )
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_bytes()
    speed = request["batch_size"] / seconds
    return {"images_per_second": speed, "step_seconds": seconds, "memory_bytes": memory, "machine": machine()}


# ---------------------------------------------------------------- pairs


def environment(malloc: str) -> dict:
    """The environment of both sides."""
    inherited = dict(os.environ)
    if malloc == "inherit":
        return inherited
    without = {key: value for key, value in inherited.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    return without | (TUNED if malloc == "tuned" else {})


def run_plain(method: str, options: argparse.Namespace) -> dict:
    request = {key: getattr(options, key) for key in ("config", "batch_size", "warmup", "steps")}
    command = [sys.executable, __file__, "--plain", json.dumps({**request, "method": method})]
    done, load = watched(command, env=environment(options.malloc))
    if done.returncode:
        sys.exit(f"the plain loop failed: {done.stderr.strip()}")
    return {**json.loads(done.stdout.splitlines()[-1]), "load": load}


def run_ours(method: str, options: argparse.Namespace, settings: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        if method.endswith(CACHED):  # bench.py fills a cache that does not exist with random logits
            method, settings = method.removesuffix(CACHED), [*settings, "--model.teacher.cache", f"{folder}/cache"]
        command = [sys.executable, str(HERE / "bench.py"), "--config", options.config, "--methods", method]
        command += ["--steps", str(options.steps), "--warmup", str(options.warmup), "--runs", "1", "--out", str(out)]
        command += ["--data.batch_size", str(options.batch_size), *settings]
        done, load = watched(command, env=environment(options.malloc))
        if done.returncode:
            sys.exit(f"bench.py with {method} failed: {done.stderr.strip()}")
        result = json.loads(out.read_text())["runs"][0]
    return {**result, "load": {**load, "busy": load["busy"] or result["load"]["busy"]}}


def measure_pair(options: argparse.Namespace, settings: list[str]) -> dict:
    """Run both sides once, the plain loop first."""
    parts = {f"plain_{method}": run_plain(method, options) for method in options.plain_methods.split(",")}
    parts |= {method: run_ours(method, options, settings) for method in options.methods.split(",")}
    unknown = any(each["load"]["busy"] is None for each in parts.values())
    return {"runs": parts, "busy": any(each["load"]["busy"] for each in parts.values()), "load_known": not unknown}


# ---------------------------------------------------------------- goals


def ratio(runs: dict, above: tuple[str, str], below: tuple[str, str]) -> float:
    return runs[above[0]][above[1]] / runs[below[0]][below[1]]


def above_plain(name: str, limit: float) -> tuple:
    """Goal for a row of ours over the plain KD loop, on the machine of the goals."""
    title = (
        f"{name.removesuffix(CACHED).upper()}{', cached logits,' if name.endswith(CACHED) else ''} / plain KD, images/s"
    )
    key = "images_per_second"
    return title, ("plain_kd", name), lambda runs: ratio(runs, (name, key), ("plain_kd", key)), ">=", limit, True


def share_of_peak(name: str) -> tuple:
    """Number that stands in for the goals above on other machines."""
    return f"{name.upper()}: share of the matrix peak", (name,), lambda runs: runs[name]["matrix_share"], "", 0.0, False


GOALS = (
    # title, runs it needs, value of one pair, ">=" or "<=" ("" for none), limit, whether it is for the goals' machine
    (
        "plain KD, images/s",
        ("plain_kd",),
        lambda runs: runs["plain_kd"]["images_per_second"],
        ">=",
        LEAST_PLAIN,
        True,
    ),
    above_plain("kd", 4.0),
    above_plain("ackd", 3.0),
    above_plain("crd", 3.0),
    above_plain(f"kd{CACHED}", 7.0),
    share_of_peak("kd"),
    share_of_peak("ackd"),
    share_of_peak("crd"),
    (
        "ACKD step / KD step",
        ("kd", "ackd"),
        lambda runs: ratio(runs, ("ackd", "step_seconds"), ("kd", "step_seconds")),
        "<=",
        1.38,
        False,
    ),
    (
        "KD: data and augmentation, share of the step",
        ("kd",),
        lambda runs: runs["kd"]["data_share"],
        "<=",
        0.03,
        False,
    ),
    (
        "KD: Lightning, logging, callbacks above the bare step",
        ("kd",),
        lambda runs: runs["kd"]["overhead"],
        "<=",
        0.05,
        False,
    ),
    (
        "ACKD peak memory / KD peak memory",
        ("kd", "ackd"),
        lambda runs: ratio(runs, ("ackd", "memory_bytes"), ("kd", "memory_bytes")),
        "<=",
        1.6,
        False,
    ),
)


def judged(pairs: list[dict], *, goals_machine: bool) -> list[dict]:
    """Every goal whose runs were measured: median, minimum and maximum over the pairs, and whether it is met.

    Args:
        pairs: Undisturbed pairs.
        goals_machine: Whether the processor has AMX and both sides the same allocator; if not, ratios to the plain
            loop are shown without a verdict.
    """
    lines = []
    for title, needed, number, direction, limit, tied in GOALS:
        if all(set(needed) <= set(pair["runs"]) for pair in pairs):
            values = median_and_range([number(pair["runs"]) for pair in pairs])
            met = None
            if direction and (goals_machine or not tied):
                met = values["median"] >= limit if direction == ">=" else values["median"] <= limit
            wanted = f"{direction} {limit:.3g}" if direction else ""
            lines.append({"goal": title, **values, "wanted": wanted, "met": met})
    return lines


VERDICTS = {True: "met", False: "MISSED", None: "not judged"}


def show(pairs: list[dict], lines: list[dict]) -> None:
    print(f"\nmedian [min, max] of {len(pairs)} pairs")
    for name in pairs[0]["runs"]:
        values = median_and_range([pair["runs"][name]["images_per_second"] for pair in pairs])
        print(f"  {name:<10} {values['median']:9,.1f} images/s  [{values['min']:,.1f}, {values['max']:,.1f}]")
    for line in lines:
        numbers = f"{line['median']:8.3f} [{line['min']:.3f}, {line['max']:.3f}]"
        verdict = VERDICTS[line["met"]] if line["wanted"] else ""
        print(f"  {line['goal']:<56} {numbers:<28} {line['wanted']:<8} {verdict}")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options of every program that measures in pairs."""
    parser.add_argument("--pairs", type=int, default=5, help="number of undisturbed pairs")
    parser.add_argument(
        "--attempts", type=int, default=None, help="largest number of pairs to run; default: 3 x --pairs"
    )
    parser.add_argument("--config", default="cifar100_resnet110_resnet20.yaml")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--malloc",
        choices=["glibc", "tuned", "inherit"],
        default="glibc",
        help="C allocator: glibc's defaults (our side keeps freed memory by itself), freed memory kept on both sides, "
        "or the settings of the environment",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="raw numbers; default: a file named by the time in benchmarks/results"
    )


def repeated(measure: Callable[[], dict], options: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Measure pairs until enough are undisturbed; return these and the others."""
    if min(options.pairs, options.steps, options.warmup, options.batch_size) < 1:
        sys.exit("--pairs, --steps, --warmup and --batch-size must be 1 or more")
    kept: list[dict] = []
    rejected: list[dict] = []
    for attempt in range(options.attempts or 3 * options.pairs):
        pair = measure()
        (rejected if pair["busy"] else kept).append(pair)
        speeds = ", ".join(f"{name} {each['images_per_second']:,.1f}" for name, each in pair["runs"].items())
        verdict = "REJECTED, other processes were busy" if pair["busy"] else f"pair {len(kept)} of {options.pairs}"
        print(f"[{attempt + 1}] {speeds} images/s: {verdict}", flush=True)
        if len(kept) == options.pairs:
            break
    return kept, rejected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument(
        "--methods",
        default="kd,ackd,crd,kd_cached",
        help="methods of our side; NAME_cached: with the teacher's logits from a cache",
    )
    parser.add_argument("--plain-methods", default="kd", help="methods of the plain loop: kd, ce, or kd,ce")
    parser.add_argument("--plain", default=None, help=argparse.SUPPRESS)  # the fresh process of the plain loop
    options, settings = parser.parse_known_args()
    if options.plain is not None:
        print(json.dumps(plain(json.loads(options.plain))))
        return
    if unknown := set(options.plain_methods.split(",")) - {"kd", "ce"}:
        parser.error(f"--plain-methods has {', '.join(sorted(unknown))}; the plain loop has kd and ce")
    kept, rejected = repeated(lambda: measure_pair(options, settings), options)
    amx, equal = has_amx(), options.malloc == "tuned"
    lines = judged(kept, goals_machine=amx and equal) if kept else []
    out = options.out or RESULTS / f"speed-{time.strftime('%Y%m%d-%H%M%S')}.json"
    chosen = {key: value for key, value in vars(options).items() if key not in ("out", "plain")}
    report = {
        "options": chosen,
        "settings": settings,
        "malloc_environment": TUNED if options.malloc == "tuned" else options.malloc,
        "amx": amx,
        "goals": lines,
        "pairs": kept,
        "rejected": rejected,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, out)
    if kept:
        show(kept, lines)
        if not amx:
            print(
                "this processor has no AMX, for which the ratios to the plain loop were set: see the shares of the peak"
            )
        elif not equal:
            print("the ratios to the plain loop are goals for equal allocators: --malloc tuned")
        if not all(pair["load_known"] for pair in kept):
            print("the load of other processes is unknown on this system; make sure that the machine is idle")
    print(f"C allocator: {ALLOCATOR[options.malloc]}; raw numbers: {out}")
    if len(kept) < options.pairs:
        sys.exit(f"only {len(kept)} of {options.pairs} pairs were undisturbed; repeat on an idle machine")


if __name__ == "__main__":
    main()
