"""KD of this package beside KD of programs that people use, in pairs, on an idle machine.

    python benchmarks/peers.py --pairs 5 --workers 8 --fast

The others are the usual loop of research code (as in RepDistiller), torchdistill through its own interface, a short
Lightning script, and Hugging Face's Trainer; those whose packages are not installed are left out. Every side runs in a
fresh process with the same networks, batch size, threads and C allocator. Images come from memory: ours through this
package's data module, those of the others through torchvision's transforms and a DataLoader with --workers processes.
Any other option is a setting of `ackd fit` for our side, such as --fast.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
import time
from pathlib import Path

import torch
from peer_loops import PEERS, Case, lacks
from speed import ALLOCATOR, RESULTS, add_common, environment, repeated, run_ours
from timing.machine import machine, median_and_range, watched
from timing.synthetic import fresh_network

from ackd_lightning.config.files import load_configs
from ackd_lightning.models.zoo import create_model
from ackd_lightning.runs.files import write_json

GOAL = 3.0
"""Images per second of our KD, divided by those of the fastest of the others."""


def measure_peer(request: dict) -> dict:
    """Measure one of the others in this process, on the networks of a configuration."""
    settings = load_configs([request["config"]])[0]
    model, data = settings["model"], pkgutil.resolve_name(settings["data"]["class_path"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    case = Case(
        teacher=fresh_network(model["teacher"]["network"], data.num_classes, data.input_size, {}).to(device),
        student=create_model(model["student"], data.num_classes).to(device),
        classes=data.num_classes,
        size=data.input_size,
        batch=request["batch_size"],
        workers=request["workers"],
        warmup=request["warmup"],
        steps=request["steps"],
        device=device,
    )
    seconds = PEERS[request["name"]](case)
    return {"images_per_second": request["batch_size"] / seconds, "step_seconds": seconds, "machine": machine()}


def run_peer(name: str, options: argparse.Namespace) -> dict:
    """Measure one of the others in a fresh process."""
    request = {key: getattr(options, key) for key in ("config", "batch_size", "warmup", "steps", "workers")}
    command = [sys.executable, __file__, "--peer", json.dumps({**request, "name": name})]
    done, load = watched(command, env=environment(options.malloc))
    if done.returncode:
        sys.exit(f"{name} failed: {done.stderr.strip()[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "load": load}


def measure_pair(options: argparse.Namespace, settings: list[str]) -> dict:
    """Run every side once, ours last."""
    runs = {name: run_peer(name, options) for name in options.peers.split(",")}
    runs["ours"] = run_ours("kd", options, settings)
    loads = [each["load"]["busy"] for each in runs.values()]
    return {"runs": runs, "busy": any(loads), "load_known": None not in loads}


def ratios(pairs: list[dict]) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of our speed over that of each of the others, and of the fastest of a pair."""
    speeds = [{name: each["images_per_second"] for name, each in pair["runs"].items()} for pair in pairs]
    others = [name for name in speeds[0] if name != "ours"]
    table = {name: median_and_range([each["ours"] / each[name] for each in speeds]) for name in others}
    best = [each["ours"] / max(each[name] for name in others) for each in speeds]
    return {**table, "the fastest": median_and_range(best)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--peers", default=",".join(PEERS), help="the others, separated by commas")
    parser.add_argument("--workers", type=int, default=8, help="processes that load images for the others")
    parser.add_argument("--peer", default=None, help=argparse.SUPPRESS)  # the fresh process of one of the others
    options, settings = parser.parse_known_args()
    if options.peer is not None:
        print(json.dumps(measure_peer(json.loads(options.peer))))
        return
    if unknown := set(options.peers.split(",")) - set(PEERS):
        parser.error(f"--peers has {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
    missing = {name: lacks(name) for name in options.peers.split(",")}
    for name, packages in missing.items():
        if packages:
            print(f"{name} is left out, because {' and '.join(packages)} is not installed")
    options.peers = ",".join(name for name, packages in missing.items() if not packages)
    if not options.peers:
        parser.error("none of --peers can be measured here")
    kept, rejected = repeated(lambda: measure_pair(options, settings), options)
    out = options.out or RESULTS / f"peers-{time.strftime('%Y%m%d-%H%M%S')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen = {key: value for key, value in vars(options).items() if key not in ("out", "peer")}
    found = ratios(kept) if kept else {}
    report = {"options": chosen, "settings": settings, "ratios": found, "pairs": kept, "rejected": rejected}
    write_json(report, Path(out))
    for name, values in found.items():
        verdict = ""
        if name == "the fastest":
            verdict = f">= {GOAL:g}  {'met' if values['median'] >= GOAL else 'MISSED'}"
        print(f"  ours / {name:<14} {values['median']:6.2f} [{values['min']:.2f}, {values['max']:.2f}]  {verdict}")
    print(f"C allocator: {ALLOCATOR[options.malloc]}; raw numbers: {out}")
    if len(kept) < options.pairs:
        sys.exit(f"only {len(kept)} of {options.pairs} pairs were undisturbed; repeat on an idle machine")


if __name__ == "__main__":
    main()
