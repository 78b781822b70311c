"""The values that a search may give to a setting."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ackd_lightning.config.yaml_files import parse_yaml
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import as_number


@dataclass(frozen=True)
class Values:
    """Values of one setting.

    Attributes:
        text: The values as text.
        choices: The values, of any kind; empty for a range.
        low: Smallest value of a range.
        high: Largest value of a range.
        log: Whether a range is searched by the logarithm.
    """

    text: str
    choices: tuple[Any, ...] = ()
    low: float | int = 0
    high: float | int = 0
    log: bool = False

    def suggest(self, trial: Any, name: str) -> Any:
        """Let a trial of Optuna choose a value.

        Args:
            trial: Trial.
            name: Name of the setting.
        """
        if self.choices:  # as text, since Optuna takes plain values only
            return json.loads(trial.suggest_categorical(name, [json.dumps(each) for each in self.choices]))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high, log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


def read_values(text: str) -> tuple[str, Values]:
    """Read ``NAME=VALUES``.

    Args:
        text: Values are ``0.1,0.5,0.9``, a range ``0.1:0.9``, or a range by the logarithm ``log:0.001:0.1``.

    Raises:
        ACKDError: If it is none of them.

    Example:
        >>> read_values("model.optimizer.lr=log:0.01:0.3")[1].low, read_values("data.batch_size=16,32")[1].choices
        (0.01, (16, 32))
    """
    name, found, values = text.removeprefix("--").partition("=")
    forms = "write NAME=0.1,0.5, NAME=0.1:0.9 or NAME=log:0.001:0.1"
    if not found or not name or not values:
        raise ACKDError(f"--set {text} names no setting and values; {forms}")
    log = values.startswith("log:")
    ends = values.removeprefix("log:").split(":")
    if len(ends) == 2 and "," not in values:
        low, high = (_number(each, text, forms) for each in ends)
        if not low < high or (log and low <= 0):
            raise ACKDError(f"--set {text}: a range goes from a smaller to a larger number{', above 0' if log else ''}")
        return name, Values(values, low=low, high=high, log=log)
    if log:
        raise ACKDError(f"--set {text} is not a range; {forms}")
    try:
        listed = parse_yaml(f"[{values}]")
    except Exception as error:  # whatever PyYAML's constructors raise
        raise ACKDError(f"--set {text} is not a list of values; {forms}") from error
    choices = tuple(dict.fromkeys(json.dumps(as_number(each)) for each in listed))
    return name, Values(values, choices=tuple(map(json.loads, choices)))


def _number(text: str, whole: str, forms: str) -> float | int:
    try:
        value = int(text) if text.strip().lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise ACKDError(f"--set {whole}: {text!r} is not a number; {forms}") from None
    if not math.isfinite(value):
        raise ACKDError(f"--set {whole}: {text} is not a number; {forms}")
    return value


def grid(space: Mapping[str, Values], most: int) -> list[dict[str, str]]:
    """Return every combination, as parameters of Optuna; none if there are ranges or more than ``most``.

    Args:
        space: Values by setting.
        most: Largest number of combinations.
    """
    if (
        not all(each.choices for each in space.values())
        or math.prod(len(each.choices) for each in space.values()) > most
    ):
        return []
    texts = [[json.dumps(value) for value in each.choices] for each in space.values()]
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*texts)]


def fragment(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return some settings of a run as a configuration.

    Args:
        settings: Content of a run's ``config.yaml``.
        names: Dotted names, without ``init_args``. Of a setting inside a list, the whole list is returned.

    Example:
        >>> fragment({"model": {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}}}, ["model.optimizer.lr"])
        {'model': {'optimizer': {'init_args': {'lr': 0.1}}}}
    """
    result: dict[str, Any] = {}
    for name in names:
        here: Any = settings
        there = result
        parts = name.split(".")
        for number, part in enumerate(parts):
            if isinstance(here, Mapping) and part not in here and "init_args" in here:
                here, there = here["init_args"], there.setdefault("init_args", {})
            here = here[part] if isinstance(here, Mapping) else None
            if isinstance(here, list) or number == len(parts) - 1:
                there[part] = here
                break
            there = there.setdefault(part, {})
    return result
