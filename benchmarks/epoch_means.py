"""Print means over seeds of what runs logged: ``python benchmarks/epoch_means.py short/runs --epochs 1,5,10``.

Runs of one row are those whose names differ in ``-seedN`` alone; runs that have not ended are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from ackd_lightning.runs.figures import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--epochs", default="1,5,10", help="epochs to print, from 1")
    chosen = parser.parse_args()
    epochs = [int(each) for each in chosen.epochs.split(",")]
    rows: dict[str, list[dict[str, dict[int, float]]]] = {}
    for summary in sorted(chosen.runs.glob("*/*-seed*/summary.json")):
        name = summary.parent.name.rpartition("-seed")[0]
        rows.setdefault(name, []).append(read_metrics(summary.parent / "metrics.csv"))
    if not rows:
        parser.error(f"{chosen.runs} has no run that has ended and whose name ends with -seedN")
    for name, seeds in rows.items():
        print(f"{name} (n = {len(seeds)})")
        for key in sorted(seeds[0]):
            values = {epoch: [each[key][epoch] for each in seeds if epoch in each.get(key, {})] for epoch in epochs}
            shown = [f"{epoch}: {mean(found):.4g}" for epoch, found in values.items() if found]
            if shown:
                print(f"  {key:24} {'  '.join(shown)}")


if __name__ == "__main__":
    main()
