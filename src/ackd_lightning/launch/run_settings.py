"""The run that a command line names: its settings, its checkpoint and the files that it was started with."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_only

from ackd_lightning.config.experiment import differences
from ackd_lightning.config.yaml_files import read_yaml
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import option_pairs
from ackd_lightning.models.class_map import FEATURES_ONLY
from ackd_lightning.models.hub import HF
from ackd_lightning.runs.files import find_checkpoint, run_folder, started_in

_INIT = "init_args"
_MEASURED = ("data.", "model.", "trainer.limit_", "trainer.fast_dev_run", "trainer.precision")
_NOT_MEASURED = (
    *(f"data.{name}" for name in ("num_workers", "batch_size", "eval_batch_size", "cache", "download", "sampling")),
    *(f"data.{name}" for name in ("augmentation", "max_per_class", "train_fraction")),
    *(f"model.{name}" for name in ("optimizer", "lr_scheduler", "recipe", "teacher", "compile")),
)
"""What the names of settings begin with that change what a test measures, and of those that do not."""
_ALONE = {"-h", "--help", "--print_config", "--overwrite", "--wandb", "--tensorboard", "--test", "--fast"}
"""Options without a value, also those that only a fit has, so that the run after one of them is found."""


def name_checkpoint(configs: list[str], rest: list[str]) -> tuple[list[str], list[str]]:
    """Replace ``RUN [--which best]`` by the run's own settings and checkpoint.

    Args:
        configs: Configurations that are named already.
        rest: Other arguments.

    Returns:
        Both, completed.
    """
    which, run, others = "last", "", []
    waiting = iter(rest)
    for argument in waiting:
        if argument == "--which" or argument.startswith("--which="):
            which = argument.partition("=")[2] or next(waiting, "")
        elif argument.startswith("-"):
            alone = "=" in argument or argument in _ALONE
            others += [argument] if alone else [argument, *itertools.islice(waiting, 1)]
        elif others[-1:] == ["--overwrite"] and argument.lower() in ("true", "false"):
            others[-1] += f"={argument}"
        elif run:
            raise ACKDError(f"one run at a time: {run} and {argument} are given; call the command once for each")
        else:
            run = argument
    if which not in ("last", "best"):
        raise ACKDError(f"--which is {which!r}; it must be last or best")
    if not run and not configs and "--ckpt_path" in others[:-1]:
        place = others.index("--ckpt_path")
        run, others = others[place + 1], [*others[:place], *others[place + 2 :]]
    if run:
        checkpoint = find_checkpoint(run, cast("Any", which))
        others = ["--ckpt_path", str(checkpoint), *others]
        configs = [_settings_of(run_folder(checkpoint)), *configs]
    return configs, others


def resumed_settings(options: Sequence[str]) -> list[str]:
    """Return the ``config.yaml`` of the run that ``--resume PATH`` names; empty if there is none.

    Args:
        options: Command line without ``--config``.

    Raises:
        ACKDError: If there is no such run, or it has no settings.
    """
    named = [Path(value) for name, value in option_pairs(options) if name == "--resume" and value not in (None, "auto")]
    if not named:
        return []
    place = named[-1]
    is_run = place.is_dir() and (place / "config.yaml").is_file()
    return [_settings_of(run_folder(place / "checkpoints" / "last.ckpt" if is_run else find_checkpoint(place)))]


def _settings_of(folder: Path) -> str:
    """The ``config.yaml`` of a run."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ACKDError(f"{folder} has no config.yaml; name the settings with --config")
    return str(path)


def find_files(settings: dict[str, Any], config: Path, given: Collection[str], *, writes: bool) -> list[str]:
    """Find files of a run that was started in another folder, to which its relative paths belong.

    Args:
        settings: Settings of the run; paths of data, weights and caches are changed in place.
        config: ``config.yaml`` of the run, which says where it was started.
        given: Dotted names of settings that are not those of the run, and are left alone.
        writes: Whether the run goes on, and writes its weights again where it wrote them.

    Returns:
        What was changed, as ``name is path``.
    """
    start = _start_of(settings, config)
    if start is None or start.samefile(Path.cwd()):
        return []
    found = []
    for holder, key, name in _paths({each: settings.get(each) for each in ("data", "model")}):
        begin = HF if holder[key].startswith(HF) else ""
        value = Path(holder[key].removeprefix(begin))
        if name not in given and not value.is_absolute() and (start / value).exists():
            holder[key] = f"{begin}{start / value}"
            found.append(f"{name} is {holder[key]}")
    weights = settings.get("weights_dir")
    if writes and isinstance(weights, str) and not Path(weights).is_absolute() and "weights_dir" not in given:
        settings["weights_dir"] = str(start / weights)
        found.append(f"weights_dir is {start / weights}")
    return found


def _start_of(settings: dict[str, Any], config: Path) -> Path | None:
    """Folder that the relative paths of a run belong to; None where it is not known.

    A run that is no longer where it was started was moved or copied with its project: then it is as far above the run
    as ``runs_dir`` is deep.
    """
    runs, places = Path(settings.get("runs_dir") or "runs"), config.resolve().parent.parents
    start = started_in(config)
    if len(places) > 1 and start is not None and (start / runs).resolve() == places[1]:
        return start
    moved = places[1 + len(runs.parts)] if len(places) > 1 + len(runs.parts) else None
    return moved if moved is not None and not runs.is_absolute() and moved / runs == places[1] else None


def started_with(run: Path) -> dict[str, Any]:
    """Return the settings that a run was started with, with its files where `find_files` finds them; or nothing.

    Args:
        run: Folder of the run.
    """
    path = run / "config.yaml"
    settings: dict[str, Any] = (read_yaml(path) or {}) if path.is_file() else {}
    if settings:
        find_files(settings, path, (), writes=False)
    return settings


def changed_test(run: Path, settings: dict[str, Any], *, same_images: bool) -> list[str]:
    """Return why a test does not measure what a run's own test measures: changed settings, each with both values.

    Another folder of data whose images are the same is none where the earlier one is gone, which is said.

    Args:
        run: Folder of the run.
        settings: Settings of the test.
        same_images: Whether the data have the images that the run was trained with (`ImageDataModule.as_trained`).
    """

    def moved(name: str, first: Any, second: Any) -> bool:
        if name != "data.root" or not same_images or not isinstance(first, str) or Path(first).exists():
            return False
        rank_zero_only(print)(f"the data were in {first} and are in {second} now: all images have the names they had")
        return True

    if not (before := started_with(run)):
        return [f"{run} has no config.yaml"]
    return [
        f"{name} {first!r} -> {second!r}"
        for name, (first, second) in differences(before, settings, places=True).items()
        if name.startswith(_MEASURED)
        and not name.startswith(_NOT_MEASURED)
        and not _same_place(first, second)
        and not moved(name, first, second)
    ]


def _same_place(first: Any, second: Any) -> bool:
    """Whether two settings are paths of one file or folder."""
    if not isinstance(first, str) or not isinstance(second, str) or not (first and second):
        return False
    one, other = Path(first), Path(second)
    return one.exists() and other.exists() and one.samefile(other)


def _paths(settings: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yield the holder, the key and the dotted name of every path that is relative to the folder of the command."""
    if isinstance(settings, dict | list):
        for key, value in list(settings.items() if isinstance(settings, dict) else enumerate(settings)):
            below = name if key == _INIT else f"{name}.{key}".lstrip(".")
            if isinstance(value, str) and value and _is_path(below, key, value):
                yield settings, key, below
            else:
                yield from _paths(value, below)


def _is_path(name: str, key: Any, value: str) -> bool:
    """Whether a setting names a file or a folder."""
    maps = key == "class_map" and value != FEATURES_ONLY
    return name == "data.root" or key in ("weights", "cache") or maps or (key == "network" and value.startswith(HF))


def refuse_other_place(folder: Path, options: Sequence[str]) -> None:
    """Refuse a name and a folder of runs beside ``--resume PATH``, which has both already.

    Args:
        folder: Folder of the run that is resumed.
        options: Command line without ``--config``.

    Raises:
        ACKDError: If they are others.
    """
    own = folder.resolve()
    for name, value in option_pairs(options):
        same = {"--name": value == own.name, "--runs_dir": Path(value or ".").resolve() == own.parents[1]}
        if not same.get(name, True):
            raise ACKDError(
                f"{name} is {value} and the run that is resumed is {folder}; leave {name} out, or start a new run from "
                "its weights with --model.student.weights"
            )
