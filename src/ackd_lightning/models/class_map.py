"""A teacher's classes and those of the data: which logits are picked, pooled or reordered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ackd_lightning.config.yaml_files import first_reason, parse_yaml
from ackd_lightning.errors import ACKDError, first_names, near_matches

FEATURES_ONLY = "features"
"""Class map of a teacher whose classes are not used at all."""


def read_class_map(given: Any) -> dict[Any, Any] | list[Any] | str:
    """Return a class map as plain data, read from its file where a path is given.

    Args:
        given: Mapping, list, path of a YAML or JSON file that holds one, or ``features``.

    Raises:
        ACKDError: If it is none of these, or the file cannot be read.
    """
    if given == FEATURES_ONLY:
        return FEATURES_ONLY
    place = "class_map"
    if isinstance(given, str):
        place, path = f"class_map {given}", Path(given).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
            given = json.loads(text) if path.suffix.lower() == ".json" else parse_yaml(text)
        except OSError as error:
            raise ACKDError(
                f"class_map is {str(path)!r} and cannot be read ({error.strerror}); name a YAML or JSON file, give the "
                f"map itself, or {FEATURES_ONLY!r}"
            ) from error
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            reason = first_reason(error)[:100]
            raise ACKDError(f"{place} is not YAML or JSON ({reason}); write one line per class of the data") from error
    if isinstance(given, Mapping) and given:
        return dict(given)
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) and given:
        return list(given)
    raise ACKDError(
        f"{place} is {str(given)[:60]!r}; it must have, for each class of the data, the teacher's class or a list of "
        "them, by name or number"
    )


class TeacherClasses:
    """Classes of a teacher, found by number, name or words.

    Args:
        count: Number of classes.
        names: Name of each class; None when unknown.
        labels: Each class in words, synonyms separated by commas, which need not be unique; None when unknown.
    """

    def __init__(self, count: int, names: Sequence[str] | None = None, labels: Sequence[str] | None = None) -> None:
        self.count = count
        self.names = None if names is None else tuple(names)
        self._places: dict[str, set[int]] = {}
        for number, label in enumerate(labels or ()):
            for word in (label, *label.split(",")):
                self._places.setdefault(_key(word), set()).add(number)
        named: dict[str, set[int]] = {}
        for number, name in enumerate(names or ()):
            named.setdefault(_key(name), set()).add(number)
        self._places |= named  # names go before words
        self._exact = {name: number for number, name in enumerate(names or ())}
        self._digits = {int(name): name for name in names or () if name.isdecimal()}

    def find(self, wanted: Any) -> int | None:
        """Return the number of a class, or None where there is none or several of that name.

        Args:
            wanted: Number, name or words.
        """
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            return wanted if 0 <= wanted < self.count and not self._is_ambiguous(wanted) else None
        if str(wanted) in self._exact:
            return self._exact[str(wanted)]
        places = self._places.get(_key(str(wanted)), set())
        return next(iter(places)) if len(places) == 1 else None

    def _is_ambiguous(self, number: int) -> bool:
        """Whether a class has digits of this value as its name, and another class this number."""
        return number in self._digits and self._exact[self._digits[number]] != number

    def problem(self, wanted: Any, owner: str) -> str:
        """Describe why `find` returned None.

        Args:
            wanted: Number, name or words.
            owner: Name of the teacher.
        """
        if isinstance(wanted, int) and self.names is not None and self._is_ambiguous(wanted):
            name, other = self._digits[wanted], next(iter(self.names[wanted : wanted + 1]), None)
            beside = "" if other is None else f", or the number of the one named {other!r}"
            return f"{wanted} may be the class named {name!r} of {owner}{beside}: write the name in quotes"
        if isinstance(wanted, int) or not self._places:
            unknown = "" if isinstance(wanted, int) else ", whose names are unknown"
            return f"{owner} has no class {wanted!r}: its classes are 0 to {self.count - 1}{unknown}"
        places = sorted(self._places.get(_key(str(wanted)), set()))
        if places:
            return f"{wanted!r} is the name of several classes of {owner} ({', '.join(map(str, places))}): use a number"
        return f"{owner} has no class {wanted!r}; {near_matches(_key(str(wanted)), self._places)}"


def _key(text: str) -> str:
    return " ".join(text.strip().lower().replace("_", " ").split())


def resolve_class_map(
    given: Mapping[Any, Any] | Sequence[Any],
    *,
    theirs: TeacherClasses,
    num_classes: int,
    names: Sequence[str] | None,
    owner: str,
) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the teacher's classes that form each class of the data.

    Args:
        given: Teacher's class or classes by class of the data (name or number), or a list of them in their order.
        theirs: Classes of the teacher.
        num_classes: Number K of the data's classes.
        names: Names of the data's classes; None when unknown.
        owner: Name of the teacher in messages.

    Returns:
        K tuples of class numbers.

    Raises:
        ACKDError: If a class does not exist, is missing, or is used twice.

    Examples:
        >>> theirs = TeacherClasses(4, ["cat", "lynx", "dog", "cow"])
        >>> resolve_class_map({"feline": ["cat", "lynx"], "canine": 2}, theirs=theirs, num_classes=2,
        ...                   names=["canine", "feline"], owner="the teacher")
        ((2,), (0, 1))
    """
    rows = _rows(given, num_classes, names, owner)
    groups: list[tuple[int, ...]] = []
    user: dict[int, Any] = {}
    for number, row in enumerate(rows):
        label = repr(names[number]) if names is not None else number
        wanted = list(row) if isinstance(row, (list, tuple)) else [row]
        if not wanted or row is None:
            raise ACKDError(f"class_map of {owner} has nothing for class {label}; give at least one class")
        group = []
        for each in wanted:
            place = theirs.find(each)
            if place is None:
                raise ACKDError(f"class_map does not fit at class {label}: {theirs.problem(each, owner)}")
            if place in user:
                raise ACKDError(
                    f"class_map of {owner} uses its class {each!r} for {user[place]} and for {label}; use it once"
                )
            user[place] = label
            group.append(place)
        groups.append(tuple(group))
    return tuple(groups)


def _rows(
    given: Mapping[Any, Any] | Sequence[Any], num_classes: int, names: Sequence[str] | None, owner: str
) -> list[Any]:
    """Return the entry of each class of the data."""
    if not isinstance(given, Mapping):
        if len(given) != num_classes:
            raise ACKDError(
                f"class_map of {owner} has {len(given)} entries and the data have {num_classes} classes; give one for "
                "each, in the order of the data's classes"
            )
        return list(given)
    places = {name: number for number, name in enumerate(names or ())}
    rows: list[Any] = [None] * num_classes
    seen: set[int] = set()
    for key, value in given.items():
        place = places.get(str(key), key)
        if isinstance(place, str) and place.isdecimal():  # a key of JSON is text
            place = int(place)
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < num_classes:
            known = near_matches(str(key), places) if places else f"its classes are 0 to {num_classes - 1}"
            if key is None or isinstance(key, bool):  # as YAML reads null and true
                known = "write names such as 'null' and 'true' in quotes"
            raise ACKDError(
                f"class_map of {owner} has the entry {key!r}, which is not a class of the data; {known} (left of the "
                "colon are the data's classes)"
            )
        if place in seen:
            raise ACKDError(f"class_map of {owner} has two entries for class {key!r} of the data; give one")
        seen.add(place)
        rows[place] = value
    missing = [names[each] if names else each for each in range(num_classes) if each not in seen]
    if missing:
        raise ACKDError(
            f"class_map of {owner} has no entry for {first_names(map(repr, missing))} of the data's {num_classes} "
            "classes; give one for each"
        )
    return rows


class ClassSelection(nn.Module):
    """Turn logits of a teacher's classes into those of the data's.

    The logit of pooled classes is the logarithm of the sum of their exponentials, so that a softmax over the result
    gives their summed probabilities, normalised over the classes that are used.

    Args:
        groups: Numbers of the teacher's classes for each class of the data.

    Examples:
        >>> pooled = ClassSelection([(0, 1), (2,)])
        >>> pooled(torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()).softmax(dim=1)
        tensor([[0.8571, 0.1429]])
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.groups = tuple(tuple(group) for group in groups)
        longest = max(len(group) for group in self.groups)
        padded = [[*group, *[group[0]] * (longest - len(group))] for group in self.groups]
        self.index: Tensor
        self.surplus: Tensor | None
        self.register_buffer("index", torch.tensor(padded), persistent=False)
        surplus = torch.tensor([[place >= len(group) for place in range(longest)] for group in self.groups])
        self.register_buffer("surplus", surplus if longest > 1 else None, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Compute logits ``B x K`` from ``B x K'``."""
        picked = logits[:, self.index]
        if self.surplus is None:
            return picked.squeeze(-1)
        return picked.masked_fill(self.surplus, -torch.inf).logsumexp(dim=-1)
