"""Table with the accuracy of every network of a run."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ackd_lightning.runs.export import peer_name


def validates_in_part(summary: dict[str, Any]) -> bool:
    """Return whether a run validates on a part of its validation images.

    Args:
        summary: Content of ``summary.json``.
    """
    return repr(summary.get("limit_val_batches", 1.0)) not in ("1.0", "None")  # 1 is one batch, 1.0 is all


def accuracy_table(summary: dict[str, Any]) -> Table:
    """Return a table with the accuracy of every network of a run, in the last and the best epoch.

    Args:
        summary: Content of ``summary.json``.
    """
    stage = summary["shown"]
    note = "test data, nothing selected on it" if stage == "test" else "validation data"
    if validates_in_part(summary):
        note = f"part of the {note} (limit_val_batches {summary['limit_val_batches']})"
    table = Table(title=f"{summary['config']}, seed {summary['seed']}: accuracy in % on {note}")
    table.add_column("network")
    for column in (_last(summary), "best", "parameters"):
        table.add_column(column, justify="right")

    def percent(values: dict[str, float], key: str) -> str:
        return f"{100 * values[key]:.2f}" if key in values else "not selected" if not values else "-"

    for teacher in [summary[key] for key in ("teacher",) if key in summary] + summary.get("other_teachers", []):
        shown = "-" if teacher["acc"] is None else f"{100 * teacher['acc']:.2f}"
        table.add_row(f"teacher {teacher['model']}", shown, "", f"{teacher['parameters']:,}")
    keys = [key for key in summary["last"] if key.startswith(f"{stage}/") and key.endswith("acc")]
    for key in sorted(keys, key=lambda key: (key.count("_"), key)):
        network = key.removeprefix(f"{stage}/").removesuffix("acc").rstrip("_")
        label, size = _label_and_size(network, summary)
        table.add_row(label, percent(summary["last"], key), percent(summary["best"], key), size)
    return table


def _last(summary: dict[str, Any]) -> str:
    """Return when the last accuracy was measured: ``last`` with the last weights, else the epoch or the step."""
    step, epoch = summary.get("measured_at", summary["steps"]), summary["last"].get("epoch", summary["epochs"])
    if step == summary["steps"]:
        return "last"
    if epoch == summary["epochs"]:
        return f"step {step:,} of {summary['steps']:,}"
    return f"epoch {epoch:.0f} of {summary['epochs']}"


def _label_and_size(network: str, summary: dict[str, Any]) -> tuple[str, str]:
    """Return how the table calls a network, and its parameters if it is a network of its own.

    Args:
        network: Network of a metric: empty for the student, ``aux1`` for the first auxiliary learner, or a group.
        summary: Content of ``summary.json``.
    """
    if not network:
        return f"student {summary['student']}", f"{summary['parameters']:,}"
    number = network.removeprefix("aux")
    learners = summary["learners"]
    if not number.isdecimal() or not 1 <= int(number) <= len(learners):
        return network, ""
    spec = learners[int(number) - 1]
    peer = peer_name(spec, summary["student"])
    return f"{network} ({peer or spec})", f"{summary['learner_parameters'][int(number) - 1]:,}" if peer else ""
