"""The numbers of a report, from what was measured, as plain data: the content of ``report.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ackd_lightning.deploy.report.cost import Cost
from ackd_lightning.deploy.report.measuring import STUDENT, TEACHER, Measured
from ackd_lightning.metrics.calibration import fit_temperature, measure_calibration
from ackd_lightning.metrics.intervals import paired_test, wilson_interval

_PAIRS = 10


def accuracies(measured: Measured) -> dict[str, Any]:
    """Return accuracy, interval and top-5 accuracy of each network.

    Args:
        measured: Outputs of the networks.
    """
    total = len(measured.target)
    found = {}
    for name in measured.answers:
        right = int(measured.right(name).sum())
        found[name] = {
            "right": right,
            "acc": right / total,
            "interval": list(wilson_interval(right, total)),
            "acc_top5": measured.top5[name] / total,
        }
    return found


def confusion_matrix(measured: Measured, classes: int) -> NDArray[np.int64]:
    """Return ``K x K`` counts of the student's answers, true classes in rows.

    Args:
        measured: Outputs of the networks.
        classes: Number K of classes.
    """
    places = measured.target * classes + measured.answers[STUDENT]
    matrix: NDArray[np.int64] = torch.bincount(places, minlength=classes * classes).view(classes, classes).numpy()
    return matrix


def per_class(matrix: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return recall with its interval, precision and count of each class that has test images.

    Args:
        matrix: ``K x K`` counts, true classes in rows.
        names: Name of each class.
    """
    found = []
    for label, name in enumerate(names):
        count, right, predicted = int(matrix[label].sum()), int(matrix[label, label]), int(matrix[:, label].sum())
        if count:
            found.append(
                {
                    "class": name,
                    "images": count,
                    "acc": right / count,
                    "interval": list(wilson_interval(right, count)),
                    "precision": right / predicted if predicted else None,
                }
            )
    return found


def confused_pairs(matrix: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the classes that are mistaken for another most often.

    Args:
        matrix: ``K x K`` counts, true classes in rows.
        names: Name of each class.
    """
    rows, columns = matrix.nonzero()
    rows, columns = rows[rows != columns], columns[rows != columns]
    order = np.argsort(-matrix[rows, columns], kind="stable")[:_PAIRS]
    return [
        {
            "class": names[row],
            "taken_for": names[column],
            "images": int(matrix[row, column]),
            "share": float(matrix[row, column] / matrix[row].sum()),
        }
        for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    ]


def calibrated(measured: Measured, validation: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Return calibration on the test set, before and after temperature scaling.

    Args:
        measured: Outputs of the networks for the test set.
        validation: Logits and targets of the validation set, on which the temperature is fitted; None without one.
    """
    before = measure_calibration(measured.student, measured.target)
    found: dict[str, Any] = {"nll": before.nll, "ece": before.ece}
    if validation is not None:
        temperature = fit_temperature(*validation)
        after = measure_calibration(measured.student, measured.target, temperature=temperature)
        found |= {
            "temperature": temperature,
            "validation_images": len(validation[1]),
            "scaled": {"nll": after.nll, "ece": after.ece},
        }
    return found


def agreement(measured: Measured) -> dict[str, Any] | None:
    """Compare the student with its teacher on the test set; None without a teacher.

    Args:
        measured: Outputs of the networks.
    """
    if TEACHER not in measured.answers:
        return None
    student, teacher = measured.right(STUDENT), measured.right(TEACHER)
    equal = (measured.answers[STUDENT] == measured.answers[TEACHER]).double().mean()
    test = paired_test(student, teacher)
    return {
        "same_answer": float(equal),
        "kl": measured.divergence,
        "both_right": test.both,
        "only_student": test.only_first,
        "only_teacher": test.only_second,
        "both_wrong": int((~student & ~teacher).sum()),
        "difference": test.difference,
        "interval": [test.low, test.high],
        "p_value": test.p_value,
        "sentence": test.sentence("the student", "the teacher"),
    }


def cost_rows(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """Return the rows of the table of size and speed as plain data.

    Args:
        costs: Networks and files.
    """
    return [
        {
            "name": each.name,
            "parameters": each.parameters,
            "multiply_adds": each.multiply_adds,
            "bytes": each.bytes,
            "right": each.right,
            "asked": each.asked,
            "note": each.note,
            "latency": [
                {
                    "batch": one.batch,
                    "device": one.device,
                    "threads": one.threads,
                    "median_ms": 1000 * one.median,
                    "spread_ms": 1000 * one.spread,
                    "images_per_second": one.throughput,
                    "passes": one.passes,
                }
                for one in each.latency
            ],
        }
        for each in costs
    ]
