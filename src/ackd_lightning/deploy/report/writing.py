"""From measurements to the files of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ackd_lightning.deploy.report import content as numbers
from ackd_lightning.deploy.report import figures, gradcam
from ackd_lightning.deploy.report.elements import FIGURES
from ackd_lightning.deploy.report.measuring import STUDENT, Measured
from ackd_lightning.deploy.report.page import markdown, page
from ackd_lightning.deploy.report.subject import Subject
from ackd_lightning.errors import ACKDError
from ackd_lightning.metrics.calibration import reliability
from ackd_lightning.metrics.intervals import wilson_interval
from ackd_lightning.runs.figures import short, visible
from ackd_lightning.runs.files import write_json
from ackd_lightning.types import DataInfo
from ackd_lightning.writing import whole_file, write_whole

_LARGEST_MATRIX = 200
"""Number of classes up to which a confusion matrix is drawn."""


def assemble(
    subject: Subject,
    measured: Measured,
    data: DataInfo,
    *,
    validation: tuple[Tensor, Tensor] | None,
    no_temperature: str,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Compute the numbers of a report and draw its figures.

    Args:
        subject: Networks.
        measured: Their outputs for the test set.
        data: Classes and normalisation.
        validation: The student's logits and targets for the validation set; None without one.
        no_temperature: Why there is no temperature, if there is no validation set.
        device: Device of the networks.

    Returns:
        Numbers, and PNG files by the name of the figure.
    """
    names = data.class_names or tuple(map(str, range(data.num_classes)))
    matrix = numbers.confusion_matrix(measured, len(names))
    classes = numbers.per_class(matrix, names)
    for cost in subject.costs:
        if cost.name in measured.files:
            right = measured.file_right(cost.name)
            cost.right, cost.asked = int(right.sum()), len(right)
    found: dict[str, Any] = {
        "network": {**subject.facts, "class_names": list(names)},
        "labels": subject.labels,
        "images": len(measured.target),
        "accuracy": numbers.accuracies(measured),
        "agreement": numbers.agreement(measured),
        "classes": classes,
        "confused": numbers.confused_pairs(matrix, names),
        "calibration": numbers.calibrated(measured, validation),
        "no_temperature": None if validation is not None else no_temperature,
        "cost": numbers.cost_rows(subject.costs),
        "learners": [
            {
                "name": name,
                "parameters": size,
                "same_answer": float((measured.answers[name] == measured.answers[STUDENT]).double().mean()),
            }
            for name, size in subject.learners.items()
        ],
        "no_gradcam": None,
        "about": subject.about,
        "notes": subject.notes,
    }
    for row in found["cost"]:
        if row["asked"]:
            row["interval"] = list(wilson_interval(row["right"], row["asked"]))
    shown = {
        "per_class": figures.per_class(
            [each["acc"] for each in classes],
            [each["interval"] for each in classes],
            [each["class"] for each in classes],
        )
    }
    if len(names) <= _LARGEST_MATRIX:
        shown["confusion"] = figures.confusion(matrix, names)
    panels = [("as trained", reliability(measured.student, measured.target))]
    if (temperature := found["calibration"].get("temperature")) is not None:
        scaled = reliability(measured.student, measured.target, temperature=temperature)
        panels.append((f"temperature {temperature:.3f}", scaled))
    shown["reliability"] = figures.reliability(panels)
    mean, std = _normalisation(data)
    if len(measured.mistakes):
        shown["mistakes"] = _mistakes(measured, names, mean, std)
    try:
        if picture := _heat_maps(subject, measured, names, mean, std, device):
            shown["gradcam"] = picture
    except ACKDError as error:
        found["no_gradcam"] = str(error)
    return found, shown


def _normalisation(data: DataInfo) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = data.image_shape[0]
    return data.mean or (0.0,) * channels, data.std or (1.0,) * channels


def _mistakes(measured: Measured, names: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]) -> bytes:
    captions = []
    for row in measured.mistakes.rows.tolist():
        answer = int(measured.answers[STUDENT][row])
        probability = float(measured.student[row].softmax(dim=0)[answer])
        file = measured.names[row] if measured.names else f"test image {row}"
        label = names[int(measured.target[row])]
        captions.append((label, f"{short(names[answer], 16)}, {100 * probability:.1f} %", file))
    return figures.mistakes(visible(measured.mistakes.images, mean, std), captions)


def _heat_maps(
    subject: Subject,
    measured: Measured,
    names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> bytes | None:
    if not subject.sources:
        return None
    background = visible(measured.examples.images, mean, std)
    target = measured.target[measured.examples.rows]
    columns = []
    for source in subject.sources:
        overlays, answers = gradcam.heat_maps(source, measured.examples.images.to(device), target, background)
        columns.append((source.name, overlays, [names[each] for each in answers.tolist()]))
    return figures.heat_maps(background, columns, [names[each] for each in target.tolist()])


def write(found: Mapping[str, Any], shown: Mapping[str, bytes], folder: Path) -> None:
    """Write ``report.md``, ``report.html``, ``report.json`` and the figures of the Markdown.

    Args:
        found: Numbers.
        shown: PNG files by the name of the figure.
        folder: Folder to write to.

    Raises:
        ACKDError: If it cannot be written.
    """
    text = markdown(found, list(shown))
    try:
        for name, picture in shown.items():
            with whole_file(folder / FIGURES / f"{name}.png") as partial:
                partial.write_bytes(picture)
        for name, content in (("report.md", text), ("report.html", page(text, shown))):
            write_whole(content, folder / name, errors="replace")
        write_json(found, folder / "report.json")
    except OSError as error:
        raise ACKDError(f"{folder} cannot be written ({error.strerror}); choose another --out, or make room") from error
