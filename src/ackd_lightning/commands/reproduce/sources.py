"""Networks that a run learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ackd_lightning.config.files import merge
from ackd_lightning.launch.arguments import option_pairs, read_value

_TEACHER = "model.teacher"


@dataclass(frozen=True)
class Source:
    """Networks that a run learns from.

    Attributes:
        networks: Settings below ``model.teacher``, without the weights, and weight file of each.
        needs: Folders of the runs that train them.
    """

    networks: tuple[tuple[Mapping[str, Any], Path], ...] = ()
    needs: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Weight files."""
        return tuple(file for _, file in self.networks)

    def settings(self) -> dict[str, Any]:
        """Return the settings of a run; those of several teachers take the place of the configuration's."""
        if len(self.networks) > 1:
            return {_TEACHER: [{**settings, "weights": str(file)} for settings, file in self.networks]}
        return {
            f"{_TEACHER}.{key}": value
            for settings, file in self.networks
            for key, value in {**settings, "weights": str(file)}.items()
        }


def lay_into_teachers(
    settings: Mapping[str, Any], overrides: Sequence[str], *, teacher: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Bring settings such as ``model.teacher.gate`` to the teachers of a run: none, one, or each of several.

    Args:
        settings: Dotted settings of a run.
        overrides: Further options of its command line.
        teacher: Whether the run has a teacher; a run without one has no use for its settings.

    Returns:
        Both, unchanged for a run with one teacher.

    Examples:
        >>> teachers = {"model.teacher": [{"network": "resnet20"}, {"network": "resnet8"}]}
        >>> lay_into_teachers(teachers, ["--model.teacher.bf16", "true", "--data.batch_size=8"])[0]
        {'model.teacher': [{'network': 'resnet20', 'bf16': True}, {'network': 'resnet8', 'bf16': True}]}
        >>> lay_into_teachers({"model.teacher.gate": "off"}, ["--data.batch_size=8"], teacher=False)
        ({}, ['--data.batch_size=8'])
    """
    teachers = settings.get(_TEACHER)
    if teacher and not isinstance(teachers, list):
        return dict(settings), list(overrides)
    others: dict[str, Any] = {}
    options: list[str] = []
    over: dict[str, Any] = {}
    for name, value in settings.items():
        if name.startswith(f"{_TEACHER}."):
            over = merge(over, _nested(name, value))
        else:
            others[name] = value
    for name, text in option_pairs(overrides):
        if name.startswith(f"--{_TEACHER}.") and text is not None:
            over = merge(over, _nested(name, read_value(text)))
        else:
            options += [name] if text is None else [f"{name}={text}"]
    if isinstance(teachers, list):
        others[_TEACHER] = [merge(each, over) for each in teachers]
    return others, options


def _nested(name: str, value: Any) -> dict[str, Any]:
    """A dotted setting of the teacher as a mapping."""
    for key in reversed(name.removeprefix("--").removeprefix(f"{_TEACHER}.").split(".")):
        value = {key: value}
    nested: dict[str, Any] = value
    return nested
