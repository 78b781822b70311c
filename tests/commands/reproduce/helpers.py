from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ackd_lightning.commands.reproduce.jobs import Job
from ackd_lightning.commands.reproduce.tables import TableSpec, read_table

PAIR = "digits_resnet20_resnet8"
SHORT = ["--trainer.max_epochs", "2", "--model.lr_scheduler.milestones", "[1]"]


def make_job(folder: Path, *arguments: str, needs: tuple[Job, ...] = (), **fields: Any) -> Job:
    """A job without a parsed run."""
    given = {"title": folder.name, "pair": PAIR, "row": "kd", "kind": "student", "seed": 0}
    given |= {"settings": {}, "config": {}, **fields}
    return Job(
        arguments=("--folder", str(folder), *arguments),
        folder=folder,
        needs=tuple(each.folder for each in needs),
        images=None,
        networks=None,
        **given,
    )


def write_table(path: Path, *, heading: str = "# An own table", **content: Any) -> Path:
    """A table file; a pair on digits where none is given."""
    content = {"pairs": {PAIR: {"config": PAIR}}, "rows": {"kd": {}}} | content
    path.write_text(f"{heading}\n{yaml.safe_dump(content, sort_keys=False)}", encoding="utf-8")
    return path


def own_table(folder: Path, **content: Any) -> TableSpec:
    """A table as read from a file."""
    return read_table(str(write_table(folder / "own.yaml", **content)))


def write_run(
    folder: Path,
    *,
    last: float = 0.5,
    best: float | None = None,
    curve: list[float] | None = None,
    **summary: Any,
) -> None:
    """A finished run: accuracies of both checkpoints, or with `curve` those of every epoch on the test set."""

    def accuracies(value: float) -> dict[str, float]:
        return {"test/acc": value, "test/acc_top5": value + 0.25, "test/aux1_acc": 0.01, "test/loss": 1.0}

    folder.mkdir(parents=True)
    facts: dict[str, Any] = {
        "config": PAIR,
        "seed": 0,
        "epochs": 2,
        "seconds": 12.5,
        "device": "CPU, 1 threads",
        "precision": "32-true",
        "versions": {"ackd_lightning": "0", "commit": "abc+", "torch": "2"},
        "shown": "val",
        "last": {"val/acc": 0.99},
        "best": {},
    }
    if curve:
        facts |= {"shown": "test", "last": {**accuracies(curve[-1]), "epoch": 2.0}}
        rows = [f"{epoch},{value},{value + 0.25}" for epoch, value in enumerate(curve)]
        text = "\n".join(["epoch,test/acc,test/acc_top5", "0,,", *rows, ""])  # the row of a learning rate has neither
        (folder / "metrics.csv").write_text(text, encoding="utf-8")
    else:
        facts["test"] = {"last": accuracies(last)} | ({} if best is None else {"best": accuracies(best)})
    (folder / "summary.json").write_text(json.dumps(facts | summary), encoding="utf-8")
