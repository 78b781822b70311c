"""What the record of a rented GPU says about the goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

IMAGES, EPOCHS = 50_000, 200
LEAST_RATIO, MOST_MINUTES, LEAST_BUSY = 5.0, 10.0, 0.90
WAYS = ("eager", "fast", "graphs")


def _best(results: Mapping[str, Any], where: str, method: str) -> tuple[str, Mapping[str, Any]] | None:
    """The fastest way of a method, with its result."""
    found = {way: results[f"{where}: {method} {way}"] for way in WAYS if f"{where}: {method} {way}" in results}
    if not found:
        return None
    way = max(found, key=lambda each: found[each]["images_per_second"])
    return way, found[way]


def _line(goal: str, value: float, unit: str, wanted: str, met: bool) -> str:
    return f"  {goal:<72} {value:9.2f} {unit:<4} {wanted:<10} {'met' if met else 'MISSED'}"


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield every measured number, and the goals beside it.

    Args:
        record: Content of the record.
    """
    results = record["results"]
    if facts := results.get("machine"):
        card, version = facts["gpu"] or "no GPU", facts["versions"]["torch"]
        yield f"{card}, torch {version}, {facts['cores']} cores, commit {facts.get('commit') or 'unknown'}"
    for name in ("tests", "tests of graphs"):
        if name in results:
            yield f"{name}: {results[name]['counts']}"
            yield from (
                f"  {test}: {outcome}" for test, outcome in results[name]["tests"].items() if outcome[0] in "fe"
            )
    for name, each in results.items():
        if "images_per_second" in each:
            busy, share = each.get("busy_share"), each.get("matrix_share")
            more = f", {100 * share:.1f} % of the matrix peak" if share is not None else ""
            more += f", busy {100 * busy:.1f} %" if busy is not None else ""
            more += f", {each['memory_bytes'] / 2**30:.2f} GiB" if each.get("memory_bytes") else ""
            yield f"  {name:<52} {each['images_per_second']:12,.0f} images/s{more}"
    yield from goals(results)
    for name, each in results.items():
        for run, summary in each.get("runs", {}).items():
            last = summary.get("test", {}).get("last") or summary.get("last", {})
            yield f"  {name}: {run}: {last.get('test/acc', last.get('val/acc'))} ({summary.get('seconds', 0):.0f} s)"
    yield from (f"FAILED {name}: {reason}" for name, reason in record["failed"].items())


def goals(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for every goal whose runs were measured.

    Args:
        results: Results by the name of their task.
    """
    for where in sorted({name.partition(": ")[0] for name in results if " batch " in name}):
        kd, ackd = _best(results, where, "kd"), _best(results, where, "ackd")
        loop = results.get(f"{where}: loop with loader")
        if kd and loop:
            ratio = kd[1]["images_per_second"] / loop["images_per_second"]
            goal = f"{where}: KD ({kd[0]}) / eager loop with torchvision's loader"
            yield _line(goal, ratio, "", f">= {LEAST_RATIO:g}", ratio >= LEAST_RATIO)
        if ackd and where.startswith("resnet110"):
            minutes = IMAGES * EPOCHS / ackd[1]["images_per_second"] / 60
            goal = f"{where}: {EPOCHS} epochs of {IMAGES:,} images with ACKD ({ackd[0]})"
            yield _line(goal, minutes, "min", f"<= {MOST_MINUTES:g}", minutes <= MOST_MINUTES)
        for name, found in (("KD", kd), ("ACKD", ackd)):
            if found and found[1].get("busy_share") is not None:
                busy = found[1]["busy_share"]
                yield _line(f"{where}: GPU busy, {name} ({found[0]})", 100 * busy, "%", ">= 90", busy >= LEAST_BUSY)
