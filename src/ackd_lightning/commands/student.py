"""The student of a run and the data that its files are compared on, for the commands that write or send files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ackd_lightning.deploy.description import Description
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.run_data import data_of_run
from ackd_lightning.runs.claim import say_unfinished
from ackd_lightning.runs.export import network_of
from ackd_lightning.runs.files import Which, find_checkpoint, read_checkpoint, read_summary, run_folder


class Student(NamedTuple):
    """Student of a run.

    Attributes:
        checkpoint: Checkpoint.
        content: Content of the checkpoint.
        network: Network in evaluation mode.
        description: What it is.
        summary: Summary of the run; empty without one.
    """

    checkpoint: Path
    content: dict[str, Any]
    network: nn.Module
    description: Description
    summary: dict[str, Any]


def read_student(run: str, which: Which, learner: int = 0) -> Student:
    """Build the student, or a peer, of a run.

    Args:
        run: Run folder or checkpoint.
        which: Checkpoint of a run folder.
        learner: Number of the learner: 0 for the student, from 1 for a peer.
    """
    checkpoint = find_checkpoint(run, which)
    folder, content = run_folder(checkpoint), read_checkpoint(checkpoint)
    say_unfinished(checkpoint)
    summary = read_summary(folder) if (folder / "summary.json").is_file() else {}
    known = {} if content["ackd_lightning"].get("quantization") else _accuracies(summary, checkpoint.stem, learner)
    metadata = {**known, "weights": f"{checkpoint.stem} epoch"}  # a student in training for int8 was measured in int8
    network, stated = network_of(content, checkpoint, learner=learner, extra=metadata)
    return Student(checkpoint, content, network, Description.from_metadata(stated, str(checkpoint)), summary)


def _accuracies(summary: dict[str, Any], which: str, learner: int) -> dict[str, str]:
    """Accuracies of a run's summary, with the number of images where it is known."""
    ending = f"/aux{learner}_acc" if learner else "/acc"
    found: dict[str, str] = {}
    trained = summary.get(which) or {} if which != "last" or summary.get("last_is_final") else {}
    for values in (trained, (summary.get("test") or {}).get(which) or {}):
        for key, value in values.items():
            if key.endswith(ending):
                part = key.partition("/")[0]
                found[f"{part}_acc"] = f"{value:.6f}"
                if count := (summary.get("images") or {}).get(part):
                    found[f"{part}_count"] = str(count)
    return found


def check_data(checkpoint: Path, description: Description, options: Sequence[str]) -> Any:
    """Return the data of a run, whose images files are compared on.

    Args:
        checkpoint: Checkpoint of the run.
        description: What its network expects.
        options: Options of the run's data, such as ``--data.root``.

    Raises:
        ACKDError: If the data are not there.
    """
    try:
        return data_of_run(checkpoint, options, description.class_names)
    except ACKDError as error:
        if options:
            raise
        raise ACKDError(
            f"files are compared on images of the run's data, which are not usable ({error}); give their place with "
            "--data.root FOLDER, or compare on random images alone with --check random"
        ) from error
