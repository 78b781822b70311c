"""Labels of a table, text or numbers, as class names and class indices."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from numbers import Number

import numpy as np
import torch
from torch import Tensor

from ackd_lightning.data.messages import say
from ackd_lightning.data.sources import NO_LABEL
from ackd_lightning.errors import ACKDError, first_names

Label = int | str | None
_EXACT = 2**53
"""Largest whole number below which a floating-point number has all digits."""
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")
_PADDED = re.compile(r"[-+]?0\d")


def read_labels(
    values: Sequence[object], place: Callable[[int], str], names: Sequence[str] | None = None
) -> list[Label]:
    """Return the labels of a column: all whole numbers, or all text; None for an empty one, for -1 and for nan.

    Text is brought into composed Unicode (NFC), so that one word is one class, whatever program wrote it.
    Numbers are read from their usual spelling alone (7, 007, 7.0), not from 1e2, which may be a name; zeros before a
    number, which are lost, are said.

    Args:
        values: Values of the column.
        place: Function of a row that names it in messages.
        names: Class names that the user gives; where they have digits beside other names, all labels are text. The
            text nan is a label where it is one of them.

    Raises:
        ACKDError: If a label is another number or no number and no text, or numbers and text are mixed.
    """
    labels: list[Label] = []
    told = False
    names = composed(names or ())
    digits = [_NUMBER.fullmatch(name) is not None for name in names]
    all_text = any(digits) and not all(digits)
    for row, value in enumerate(values):
        if not isinstance(value, str | Number | np.generic | None):
            raise ACKDError(
                f"the label in {place(row)} is {type(value).__name__}, and labels are whole numbers or text: set "
                "label_column"
            )
        text = "" if value is None else composed([str(value)])[0].strip()
        is_text = isinstance(value, str | bool | np.bool_) and _NUMBER.fullmatch(text) is None
        listed = isinstance(value, str) and text in names
        if text and (listed or text.lower() != "nan") and (all_text or is_text):
            labels.append(text)
            continue
        number = _whole(text or str(NO_LABEL))
        if number is None or number < NO_LABEL:
            raise ACKDError(f"the label {text!r} in {place(row)} is not a class: use whole numbers from 0, or names")
        if isinstance(value, float | np.floating) and number > _EXACT:
            raise ACKDError(
                f"the label {text} in {place(row)} is a floating-point number without its last digits, which may be "
                "several classes: store the column as whole numbers or text"
            )
        labels.append(None if number == NO_LABEL else number)
        if isinstance(value, str) and _PADDED.match(text) and not (names or told):
            told = True
            say(f"the label {text!r} in {place(row)} is read as {number}: list such labels in class_names to keep them")
    numbers = [row for row, label in enumerate(labels) if isinstance(label, int)]
    texts = [row for row, label in enumerate(labels) if isinstance(label, str)]
    if numbers and texts:
        odd, rest = (texts[0], "numbers") if len(texts) <= len(numbers) else (numbers[0], "text")
        raise ACKDError(
            f"the label {labels[odd]!r} in {place(odd)} stands among labels that are {rest}: use one "
            "kind, or list all of them in class_names to read them as text"
        )
    return labels


def composed(names: Sequence[str]) -> list[str]:
    """Return names in composed Unicode (NFC).

    Args:
        names: Names of classes, as they were written.
    """
    return [unicodedata.normalize("NFC", name) for name in names]


def _whole(text: str) -> int | None:
    """Return the whole number of a text, that of no label for NaN, and None for another number or none."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if number.is_nan():
        return NO_LABEL
    return int(number) if number.is_finite() and number == number.to_integral_value() else None


def _number(name: str) -> int | None:
    """Return the whole number that a name is; None for another name."""
    return _whole(name) if _NUMBER.fullmatch(name) else None


def classes_of(
    labels: Sequence[Label], names: Sequence[str] | None, place: str, *, positions: bool = False
) -> tuple[dict[Label, int], list[str]]:
    """Return the class index of each label, and the class names.

    Args:
        labels: Labels of the training part.
        names: Class names that the user gives: those of the numbers from 0, or the order of the labels. None for the
            numbers themselves, and for the texts in alphabetical order.
        place: Name of the table, for messages.
        positions: Whether numbers are positions in ``names`` for certain, also where these have digits themselves.

    Raises:
        ACKDError: If there are fewer than two classes, or the given names do not fit or one stands twice, or a number
            may be a name as well as the position of another one.
    """
    found = sorted({label for label in labels if label is not None}, key=lambda label: (str(type(label)), label))
    if len(found) < 2:
        raise ACKDError(f"{place} has {len(found)} classes in its training part, and a classifier needs two")
    if names is None:
        if isinstance(found[0], int) and found != list(range(len(found))):
            listed = first_names(found, 5)
            say(f"the labels of {place} are {listed}: they become the classes 0 to {len(found) - 1}")
        return {label: index for index, label in enumerate(found)}, [str(label) for label in found]
    names = composed(names)
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise ACKDError(f"class_names has {twice!r} twice: give every class a name of its own")
    known: list[Label] = list(names)
    if isinstance(found[0], int):
        known = list(range(len(names))) if positions else _numbers(found, names, place)
    unknown = [label for label in found if label not in set(known)]
    if unknown and found == list(range(1, len(names) + 1)):
        raise ACKDError(
            f"the labels of {place} run from 1 to {len(names)} and class_names are those of the numbers from 0: "
            "subtract 1 from the labels"
        )
    if unknown:
        raise ACKDError(f"the label {unknown[0]!r} of {place} is not one of the {len(names)} class_names: add it")
    if unseen := [name for name, label in zip(names, known, strict=True) if label not in set(found)]:
        say(f"no training image of {place} has the class {first_names(unseen)}")
    return {label: index for index, label in enumerate(known)}, list(names)


def _numbers(found: Sequence[Label], names: Sequence[str], place: str) -> list[Label]:
    """Return the number of each class in a table: its position, or its name where the names are these numbers."""
    by_position: list[Label] = list(range(len(names)))
    by_name: list[Label] = [_number(name) for name in names]
    if not set(found) <= set(by_name) or len(set(by_name)) < len(names):
        return by_position
    if set(found) <= set(by_position):
        refuse_ambiguous(names, place)
        return by_position
    return by_name


def refuse_ambiguous(names: Sequence[str], place: str) -> None:
    """Refuse class names one of which is the number of another class, where labels may be names or numbers.

    Args:
        names: Names of the classes.
        place: Where the labels are, for the message.

    Raises:
        ACKDError: Naming it.
    """
    for position, name in enumerate(names):
        number = _number(name)
        if number is not None and number != position and 0 <= number < len(names):
            raise ACKDError(
                f"the label {number} of {place} may be the class named {name!r} or number {number} of class_names, "
                f"{names[number]!r}: leave class_names out, or use names that are no numbers in both places"
            )


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
