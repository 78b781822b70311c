"""Keep the figures of the runs of a table in one small file, and print them as a table in Markdown.

``python benchmarks/records.py screen --against kd_1_1 --out benchmarks/results/tiny100-screen-2.json`` reads the folder
that ``ackd reproduce`` wrote to; with such a file in place of the folder it prints the table alone, and with a file and
a folder it adds the runs of the folder, none of which may be in the file with other figures. Accuracies are
those of the last epoch on the test set, in percent; the difference is paired by seed, with Student's 95 % interval from
three seeds on. ``validation`` is the mean accuracy of the last epoch on the validation part: weights are chosen by it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ackd_lightning.commands.compare import mean_and_std
from ackd_lightning.metrics.intervals import mean_interval

NAMES = (
    "Here `undetached` is ackd.yaml and `ackd` is ackd_detached.yaml; of the rows of ACKD only those with `undetached` "
    "in their names have no stop-gradient in Eq. 6."
)


def record(summary: dict[str, Any], row: str) -> dict[str, Any]:
    """Return the figures of one run."""
    test = tested(summary)
    assert test is not None
    learners = range(1, len(summary["learners"]) + 1)
    figures = {"acc": "acc", "group": "group_acc", **{f"aux{number}": f"aux{number}_acc" for number in learners}}
    found = {name: round(100 * test[f"test/{key}"], 2) for name, key in figures.items() if f"test/{key}" in test}
    if (validation := summary["last"].get("val/acc")) is not None:
        found["validation"] = round(100 * validation, 2)
    if (weight := summary["last"].get("val/attention_weight_aux1")) is not None:
        found["attention_aux1"] = round(100 * weight, 2)
    known = {"row": row, "seed": summary["seed"], "commit": summary["versions"]["commit"]}
    return {**known, "epochs": summary["epochs"], "seconds": round(summary["seconds"]), **found}


def tested(summary: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the last weights have on the test set: by a test, or by validation on it; None without either."""
    found = summary.get("test", {}).get("last") or (summary["last"] if summary["shown"] == "test" else None)
    return found if found is None or "test/acc" in found else None


def difference(values: dict[int, float], others: dict[int, float]) -> str:
    """Return the mean difference over the seeds that both rows have, with an interval from three seeds on."""
    pairs = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if not pairs:
        return ""
    text = f"{statistics.fmean(pairs):+.2f}"
    interval = mean_interval(pairs) if len(pairs) > 2 else None
    text += "" if interval is None else f" [{interval[0]:+.2f}, {interval[1]:+.2f}]"
    return text if len(pairs) == len(values) else f"{text}, n = {len(pairs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "sources", type=Path, nargs="+", help="folders that ackd reproduce wrote to, and files of this script"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--prefix", help="configuration whose runs are read, where a folder has those of several")
    parser.add_argument("--rows", help="rows to keep, separated by commas; default: all")
    parser.add_argument("--seeds", help="seeds to keep, separated by commas; default: all")
    parser.add_argument("--against", help="row that the others are compared with")
    parser.add_argument("--command", default="", help="command that made the runs, to be kept in the file")
    chosen = parser.parse_args()
    wanted = chosen.rows.split(",") if chosen.rows else None
    seeds = [int(each) for each in chosen.seeds.split(",") if each] if chosen.seeds else None
    head: dict[str, Any] = {}
    by_run: dict[tuple[str, int], dict[str, Any]] = {}
    for source in chosen.sources:
        try:
            first, runs = read(source, chosen.prefix)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            parser.error(f"{source} is no folder of ackd reproduce and no file of this script ({error!r})")
        head = head or first
        for each in runs:
            row, seed = key = each["row"], each["seed"]
            if (wanted is not None and row not in wanted) or (seeds is not None and seed not in seeds):
                continue
            if by_run.setdefault(key, each) != each:
                parser.error(f"{source} has a run of {row}, seed {seed}, and so has another source; give one of them")
    by_run = dict(sorted(by_run.items()))
    found = [*by_run.values()]
    if missing := {*(wanted or ())} - {row for row, _ in by_run}:
        parser.error(f"no finished run of {', '.join(sorted(missing))} that was tested")
    if chosen.against and len(lengths := {each["epochs"] for each in found}) > 1:
        parser.error(f"runs of {', '.join(map(str, sorted(lengths)))} epochs are not compared; choose with --prefix")
    if chosen.against not in {None, *(each["row"] for each in found)}:
        parser.error(f"--against {chosen.against}: no finished run of that row among those that were chosen")
    if not found:
        parser.error(f"{chosen.sources[0]} has no finished run of these rows that was tested")
    if chosen.out is not None:
        lines = ",\n".join(f"  {json.dumps(each)}" for each in found)
        text = json.dumps(head | ({"command": chosen.command} if chosen.command else {}), indent=1)[:-2]
        chosen.out.write_text(f'{text},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    show(found, chosen.against)


def read(source: Path, prefix: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the runs of a folder or a file have in common, and the figures of each."""
    if not source.is_dir():
        content = json.loads(source.read_text(encoding="utf-8"))
        runs = content.pop("runs") if isinstance(content, dict) else []
        if not content or any(not {"row", "seed", "epochs", "acc"} <= each.keys() for each in runs):
            raise ValueError("it lacks figures")
        return content, runs
    found = sorted(source.glob(f"runs/{prefix}+*/*/summary.json" if prefix else "runs/*/*/summary.json"))
    summaries = [(path, json.loads(path.read_text())) for path in found]
    pairs = {path.parents[1].name.partition("+")[0] for path, _ in summaries}
    runs = []
    for path, each in summaries:
        pair = f"{path.parents[1].name.partition('+')[0]}: " if len(pairs) > 1 else ""
        if tested(each) is not None:
            runs.append((pair + re.sub(r"-seed\d+$", "", path.parent.name), each))
    if not runs:
        return {}, []
    first = runs[0][1]
    same = {"versions": {k: v for k, v in first["versions"].items() if k != "commit"}, "device": first["device"]}
    return {**same, "precision": first["precision"], "command": ""}, [record(each, row) for row, each in runs]


def show(found: Sequence[dict[str, Any]], reference: str | None) -> None:
    """Print one row for every row of the table, the least accurate first."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in found:
        rows[each["row"]].append(each)
    by_seed = {row: {each["seed"]: each["acc"] for each in group} for row, group in rows.items()}
    against = by_seed.get(reference or "", {})
    minus = f"minus {reference}" if reference else "difference"
    print(f"| row | n | accuracy | each seed | {minus} | validation | group | auxiliary learners | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda name: statistics.fmean(by_seed[name].values())):
        group = rows[row]
        helpers = [key for key in group[0] if re.fullmatch(r"aux\d+", key)]
        means = [f"{statistics.fmean(each[key] for each in group):.2f}" for key in helpers]
        validation, together = (
            f"{statistics.fmean(each[key] for each in group):.2f}" if all(key in each for each in group) else ""
            for key in ("validation", "group")
        )
        apart = difference(by_seed[row], against) if row != reference else ""
        seeds = ", ".join(f"{value:.2f}" for value in by_seed[row].values())
        accuracy = mean_and_std(list(by_seed[row].values()))
        taken = ", ".join(str(each["seconds"]) for each in group if "seconds" in each)
        cells = (f"`{row}`", len(group), accuracy, seeds, apart, validation, together, ", ".join(means), taken)
        print(f"| {' | '.join(map(str, cells))} |")
    if any("undetached" in row for row in rows):
        print(NAMES)


if __name__ == "__main__":
    main()
