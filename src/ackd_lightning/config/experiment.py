"""Which settings make an experiment, and which only state where its files are, how it is shown and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_NOT_THE_EXPERIMENT = {"seed_everything", "name", "runs_dir", "weights_dir", "wandb", "tensorboard", "ckpt_path"}
_NOT_THE_EXPERIMENT |= {"output", "test", "resume", "on_nonfinite", "fast"}
_SAME_RESULTS = {f"trainer.{each}" for each in ("enable_progress_bar", "enable_model_summary", "logger")}
_SAME_RESULTS |= {"trainer.log_every_n_steps", "data.download", "data.cache", "model.teacher.cache"}
_PLACES = {"data.root", "data.url", "model.teacher.weights"}


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict) or (not settings and prefix):
        return {prefix.rstrip("."): settings}
    return {key: value for name, each in settings.items() for key, value in _flat(each, f"{prefix}{name}.").items()}


def experiment_settings(config: dict[str, Any], *, places: bool = False) -> dict[str, Any]:
    """Return what makes an experiment by dotted name: a run's settings without seed, name and display.

    Args:
        config: Content of a run's ``config.yaml``.
        places: Whether to keep where the files of data and teacher are.
    """
    content = {key: value for key, value in config.items() if key not in _NOT_THE_EXPERIMENT}
    flat = {key.replace(".init_args", ""): value for key, value in _flat(content).items()}
    left_out = _SAME_RESULTS if places else _SAME_RESULTS | _PLACES
    kept = {key: value for key, value in flat.items() if key not in left_out}
    if isinstance(teachers := kept.get("model.teacher"), list):
        kept["model.teacher"] = [_without(left_out, each) for each in teachers]
    return kept


def differences(before: dict[str, Any], now: dict[str, Any], *, places: bool = False) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two experiments: both values by dotted name.

    Args:
        before: Content of the ``config.yaml`` of the first.
        now: That of the second; a setting that only one of them has does not count.
        places: Whether to count where the files of data and teacher are.
    """
    return differing(*(experiment_settings(each, places=places) for each in (before, now)))


def differing(there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs between two results of `experiment_settings`: both values by dotted name.

    Settings that only one side has (those of another version) are not compared, but a class or a mapping and what
    another side has in its place are.

    Args:
        there: Settings of the first experiment.
        here: Settings of the second.

    Examples:
        >>> differing({"a.class_path": "X", "a.n": 1, "b": 1}, {"a": None, "b": 1, "c": 3})
        {'a': ('X', None)}
    """
    found = {key: (there[key], here[key]) for key in there.keys() & here.keys() if there[key] != here[key]}
    for one, other in ((there, here), (here, there)):
        for name in one.keys() - other.keys():
            if below := {
                key.removeprefix(f"{name}."): each for key, each in other.items() if key.startswith(f"{name}.")
            }:
                values = (one[name], below.get("class_path", below))
                found[name] = values if one is there else (values[1], values[0])
    return dict(sorted(found.items()))


def moved_data(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, str] | None:
    """Return the folders of two runs' data where they are different data, and None for the same.

    A folder that is no longer there has been moved, so that another one holds the same data.

    Args:
        before: Content of the ``config.yaml`` of the first run.
        now: That of the second.
    """
    roots = [experiment_settings(each, places=True).get("data.root") for each in (before, now)]
    first, second = (Path(each) if isinstance(each, str) else None for each in roots)
    if first is None or second is None:
        return None
    other = first.exists() and not (second.exists() and first.samefile(second))
    return (str(first), str(second)) if other and first != second else None


def _without(left_out: set[str], teacher: Any) -> Any:
    """One of several teachers without some settings."""
    if not isinstance(teacher, dict):
        return teacher
    return {key: value for key, value in teacher.items() if f"model.teacher.{key}" not in left_out}
