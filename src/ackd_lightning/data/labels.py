"""Labels of a table, text or numbers, as class names and class indices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Number

import numpy as np
import torch
from torch import Tensor

from ackd_lightning.data.messages import say
from ackd_lightning.data.sources import NO_LABEL
from ackd_lightning.errors import ACKDError

Label = int | str | None
_SHOWN = 5


def read_labels(values: Sequence[object], place: Callable[[int], str]) -> list[Label]:
    """Return the labels of a column: all whole numbers, or all text; None for an empty one, and for -1.

    Args:
        values: Values of the column.
        place: Function of a row that names it in messages.

    Raises:
        ACKDError: If a label is another number or no number and no text, or numbers and text are mixed.
    """
    labels: list[Label] = []
    for row, value in enumerate(values):
        if not isinstance(value, str | Number | np.generic | None):
            raise ACKDError(
                f"the label in {place(row)} is {type(value).__name__}, and labels are whole numbers or text: set "
                "label_column"
            )
        text = "" if value is None else str(value).strip()
        try:
            number = float(text or NO_LABEL)
        except ValueError:
            labels.append(text)
            continue
        if math.isnan(number):
            number = float(NO_LABEL)
        if not number.is_integer() or number < NO_LABEL:
            raise ACKDError(f"the label {text!r} in {place(row)} is not a class: use whole numbers from 0, or names")
        labels.append(None if number == NO_LABEL else int(number))
    numbers = [row for row, label in enumerate(labels) if isinstance(label, int)]
    texts = [row for row, label in enumerate(labels) if isinstance(label, str)]
    if numbers and texts:
        odd, rest = (texts[0], "numbers") if len(texts) <= len(numbers) else (numbers[0], "text")
        raise ACKDError(f"the label {labels[odd]!r} in {place(odd)} stands among labels that are {rest}: use one kind")
    return labels


def classes_of(labels: Sequence[Label], names: Sequence[str] | None, place: str) -> tuple[dict[Label, int], list[str]]:
    """Return the class index of each label, and the class names.

    Args:
        labels: Labels of the training part.
        names: Class names that the user gives: those of the numbers from 0, or the order of the texts. None for the
            numbers themselves, and for the texts in alphabetical order.
        place: Name of the table, for messages.

    Raises:
        ACKDError: If there are fewer than two classes, or the given names do not fit.
    """
    found = sorted({label for label in labels if label is not None}, key=lambda label: (str(type(label)), label))
    if len(found) < 2:
        raise ACKDError(f"{place} has {len(found)} classes in its training part, and a classifier needs two")
    if names is None:
        if isinstance(found[0], int) and found != list(range(len(found))):
            listed = ", ".join(map(str, found[:_SHOWN])) + (", …" if len(found) > _SHOWN else "")
            say(f"the labels of {place} are {listed}: they become the classes 0 to {len(found) - 1}")
        return {label: index for index, label in enumerate(found)}, [str(label) for label in found]
    known: list[Label] = list(range(len(names))) if isinstance(found[0], int) else list(names)
    unknown = [label for label in found if label not in set(known)]
    if unknown:
        raise ACKDError(f"the label {unknown[0]!r} of {place} is not one of the {len(names)} class_names: add it")
    return {label: index for index, label in enumerate(known)}, list(names)


def targets_of(labels: Sequence[Label], index: dict[Label, int], place: Callable[[int], str], *, train: bool) -> Tensor:
    """Return ``N`` int64 class indices, -1 for images without a label, which only the training part may have.

    Args:
        labels: Labels.
        index: Class index of each label.
        place: Function of a row that names it in messages.
        train: Whether this is the training part.

    Raises:
        ACKDError: If a label is not a class of the training part, or is missing in another part.
    """
    targets = []
    for row, label in enumerate(labels):
        if label is None and not train:
            raise ACKDError(f"{place(row)} has no label: validation and test images need one")
        if label is not None and label not in index:
            raise ACKDError(f"the label {label!r} in {place(row)} is not a class of the training part: correct it")
        targets.append(NO_LABEL if label is None else index[label])
    missing = targets.count(NO_LABEL)
    if missing:
        say(f"{missing:,} of {len(targets):,} training images have no label")
    return torch.tensor(targets, dtype=torch.int64)
