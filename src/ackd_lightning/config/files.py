"""Find packaged configurations by name from any folder, and merge fragments before they are parsed."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from ackd_lightning.config.home import expand_home
from ackd_lightning.config.yaml_files import read_yaml
from ackd_lightning.errors import ACKDError, near_matches

_INCLUDE = "include"
_METHODS = "methods"
_RECIPES = "recipes"
_SECTIONS = ("trainer", "model", "data")
"""Settings that hold others; an empty one changes nothing."""
_SHORT = {"student": "network"}
"""Settings whose name or class is short for a mapping with this key."""
_CLASSES = ("method", "optimizer", "lr_scheduler")
"""Settings of the model that are classes."""
_TORCH = {"optimizer": "torch.optim", "lr_scheduler": "torch.optim.lr_scheduler"}
_NAME = re.compile(r"[A-Za-z_][\w.]*(?<!\.yaml)(?<!\.yml)")


@cache
def config_folder() -> Path:
    """Return the folder of the packaged configurations: in an installed wheel, or the repository's ``configs/``."""
    package = Path(str(files("ackd_lightning")))
    inside = package / "configs"
    return inside if inside.is_dir() else package.parents[1] / "configs"


@cache
def packaged_names() -> tuple[str, ...]:
    """Return the file names of the packaged runs, without the fragments."""
    return tuple(sorted(path.name for path in config_folder().glob("*.yaml")))


@cache
def method_names() -> tuple[str, ...]:
    """Return the file names of the method fragments, for a second ``--config``."""
    return tuple(sorted(path.name for path in (config_folder() / _METHODS).glob("*.yaml")))


@cache
def recipe_names() -> tuple[str, ...]:
    """Return the file names of the recipes, for a further ``--config``."""
    return tuple(sorted(path.name for path in (config_folder() / _RECIPES).glob("*.yaml")))


def describe_config(name: str) -> str:
    """Return the first comment line of a packaged configuration.

    Args:
        name: File name of a run, a method or a recipe.
    """
    path = find_config(name)
    with path.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")


def find_config(value: str) -> Path:
    """Resolve the value of ``--config``: a path first, then a packaged run, then a method or a recipe.

    Args:
        value: Path or name, but not a sum; ``.yaml`` may be left out of a name.

    Raises:
        ACKDError: With near matches, when nothing is found.
    """
    path = Path(value)
    if path.is_file():
        return path
    name = value if path.suffix in (".yaml", ".yml") else f"{value}.yaml"
    if Path(name).is_file():
        return Path(name)
    for folder in (config_folder(), config_folder() / _METHODS, config_folder() / _RECIPES):
        if not value.startswith(".") and (folder / name).is_file():
            return folder / name
    known = {Path(each).stem: each for each in (*packaged_names(), *method_names(), *recipe_names())}
    known |= {each.stem: str(path.parent / each.name) for each in path.parent.glob("*.y*ml")}
    hint = near_matches(Path(name).stem, known, otherwise="`ackd configs` lists the packaged configurations")
    for stem, place in known.items():
        hint = hint.replace(repr(stem), repr(place))
    raise ACKDError(f"--config {value}: there is no such file and no packaged configuration of that name; {hint}")


def config_parts(value: str) -> list[str]:
    """Split the value of ``--config`` that sums methods, such as ``kd+crd``, into their names.

    Args:
        value: Path or name; anything but a sum is its only part.

    Examples:
        >>> config_parts("kd+crd"), config_parts("kd.yaml"), config_parts("runs/a+b/config.yaml")
        (['kd', 'crd'], ['kd.yaml'], ['runs/a+b/config.yaml'])
    """
    if "+" not in value or Path(value).name != value or Path(value).is_file():
        return [value]
    return value.split("+")


def _read_sum(value: str, parts: Sequence[str]) -> dict[str, Any]:
    """Read the fragments of a sum: their methods become one `Sum`, other settings are laid over each other."""
    result: dict[str, Any] = {}
    methods = []
    for part in parts:
        content = read_config(find_config(part)) if part else {}
        model = content.get("model")
        method = model.pop("method", None) if isinstance(model, dict) else None
        if not isinstance(method, dict) or "class_path" not in method:
            raise ACKDError(
                f"--config {value} sums methods and {part!r} names none; write it as a --config of its own, or join "
                "fragments of methods as in kd+crd"
            )
        methods.append(method)
        result = merge(result, content)
    summed = {"class_path": "ackd_lightning.methods.Sum", "init_args": {"methods": methods}}
    return merge(result, {"model": {"method": summed}})


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one configuration over another: mappings merge, everything else is replaced.

    Where ``over`` names another ``class_path``, the arguments of the old class are dropped, and so are settings that
    are no arguments of a class. ``student: resnet20`` is short for ``student: {network: resnet20}``: it replaces a
    mapping, and a mapping is laid over it.

    Args:
        base: Lower configuration.
        over: Upper configuration.
    """
    result = copy.deepcopy(base)
    plain = "class_path" in over and not {"class_path", "init_args"} & base.keys()  # settings that are no arguments
    other = "class_path" in over and "class_path" in base and not _one_class(base["class_path"], over["class_path"])
    if other or plain:
        result = {}
    for key, value in over.items():
        lower = result.get(key)
        if key in _SHORT and isinstance(value, dict):
            if "class_path" not in value:
                lower = long_form(lower, key)
            elif isinstance(lower, dict) and "class_path" not in lower:
                lower = None  # the short form replaces the long one
        both = isinstance(value, dict) and isinstance(lower, dict)
        result[key] = merge(cast("dict[str, Any]", lower), value) if both else copy.deepcopy(value)
    if "class_path" in result:  # first, where a reader looks for it
        result = {"class_path": result["class_path"], **result}
    return result


def _one_class(*paths: object) -> bool:
    """Whether two paths name one class: ackd_lightning.ACKD and ackd_lightning.methods.ACKD do, and so does ACKD."""
    packages = {str(path).partition(".")[0] for path in paths if "." in str(path)}
    return len({str(path).rpartition(".")[2] for path in paths}) == 1 and len(packages) < 2


def long_form(value: Any, key: str) -> Any:
    """Write a value that stands for a mapping with one key as that mapping; any other value is returned as it is.

    Args:
        value: Value of a setting, such as ``resnet20``.
        key: Name of the setting, such as ``student``.

    Examples:
        >>> long_form("resnet20", "student")
        {'network': 'resnet20'}
    """
    short = isinstance(value, str) or (isinstance(value, dict) and "class_path" in value)
    return {_SHORT[key]: value} if key in _SHORT and short else value


def of_torch(spec: dict[str, Any], key: str) -> dict[str, Any]:
    """Complete the bare name of one of torch's optimizers or schedules, which other libraries sub-class or repeat.

    Args:
        spec: Class with its ``class_path``.
        key: Name of the setting, such as ``optimizer``.
    """
    module, name = _TORCH.get(key), str(spec["class_path"])
    if module is None or "." in name or not hasattr(importlib.import_module(module), name):
        return spec
    return {**spec, "class_path": f"{module}.{name}"}


def walk(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name of every setting below a value, ``init_args`` left out of it, and its value.

    Args:
        value: Settings; the elements of a list have the name of the list.
        name: Dotted name of the value.
    """
    items = value.items() if isinstance(value, Mapping) else ()
    for key, inner in [("", each) for each in value] if isinstance(value, list | tuple) else items:
        below = name if key in ("", "init_args") else f"{name}.{key}".lstrip(".")
        if key != "init_args":
            yield below, inner
        yield from walk(inner, below)


def read_config(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file, laid over the fragments in its ``include`` list.

    Args:
        path: YAML file; fragments are named relative to it, or to the packaged folder.

    Raises:
        ACKDError: When it is not a YAML mapping, or a fragment is missing or includes itself.
    """
    if path.resolve() in _seen:
        raise ACKDError(f"{path} includes itself through {_seen[-1]}; remove it from `include`")
    content = {} if (read := read_yaml(path)) is None else read
    if not isinstance(content, dict):
        raise ACKDError(f"{path} holds a {type(content).__name__}, not settings; write `key: value` lines")
    result: dict[str, Any] = {}
    included = content.pop(_INCLUDE, None) or []
    content = _expand_home({key: value for key, value in content.items() if key not in _SECTIONS or value is not None})
    _refuse_dots(content, path)
    for holder, key in ((content, "data"), *((content.get("model"), key) for key in _CLASSES)):
        if isinstance(holder, dict) and isinstance(name := holder.get(key), str) and _NAME.fullmatch(name):
            holder[key] = of_torch({"class_path": name}, key)
    if not isinstance(included, list):
        raise ACKDError(f"`include` of {path} is {included!r}, not a list; write include: [{included}]")
    for name in included:
        candidates = [path.parent / f"{name}.yaml", config_folder() / f"{name}.yaml"]
        found = next((each for each in candidates if each.is_file()), None)
        if found is None:
            known = (
                str(each.relative_to(config_folder()).with_suffix("")) for each in config_folder().glob("*/*.yaml")
            )
            ended = any(each.with_suffix("").is_file() for each in candidates)
            hint = "leave .yaml out" if ended else near_matches(str(name), known)
            raise ACKDError(f"{path} includes {name!r}, which does not exist; {hint}")
        result = merge(result, read_config(found, (*_seen, path.resolve())))
    return merge(result, content)


def _refuse_dots(content: dict[str, Any], path: Path) -> None:
    """Refuse names with dots, which would not be laid over the settings of other files."""
    for place in ("", *_SECTIONS):
        section = content.get(place) if place else content
        for key in section if isinstance(section, dict) else ():
            if "." in str(key):
                *parents, last = name = f"{place}.{key}".lstrip(".").split(".")
                nested = f"{''.join(f'{part}: {{' for part in parents)}{last}: ...{'}' * len(parents)}"
                raise ACKDError(f"{path} has the setting {'.'.join(name)!r} with dots, as options have; write {nested}")


def _expand_home(value: Any) -> Any:
    """Replace the ``~`` at the beginning of every path in settings by the home folder."""
    if isinstance(value, dict):
        return {key: _expand_home(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_expand_home(each) for each in value]
    return expand_home(value) if isinstance(value, str) else value


def read_files(value: str) -> list[Path]:
    """Return the files of a configuration: those that it includes, and itself last.

    Args:
        value: Path or name, but not a sum.
    """
    path = find_config(value)
    content = read_yaml(path)
    found: list[Path] = []
    for name in (content.get(_INCLUDE) or []) if isinstance(content, dict) else []:
        local = path.parent / f"{name}.yaml"
        found += read_files(str(local if local.is_file() else config_folder() / f"{name}.yaml"))
    return [*found, path]


def method_fragment(values: Sequence[str]) -> str | None:
    """Return the name of the packaged method that configurations choose, such as ``simkd``; None without one.

    Args:
        values: Paths or names, as given to ``--config``.
    """
    found = None
    for value in values:
        if len(config_parts(value)) > 1:
            found = None
            continue
        methods = [path.stem for path in read_files(value) if path.parent == config_folder() / _METHODS]
        found = methods[-1] if methods else found
    return found


def load_configs(values: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Read every configuration, each laid over those before it, and the first over the packaged recipe.

    One that names the class of a method replaces the method with all its arguments.

    Args:
        values: Paths or names, as given to ``--config``; methods joined by ``+`` are summed.

    Returns:
        Settings, and a name for the run: the file stems joined by ``+``.
    """
    result = read_config(config_folder() / _RECIPES / "sgd.yaml")
    names = []
    for value in values:
        parts = config_parts(value)
        paths = [find_config(part) for part in parts if part]
        if not value:
            raise ACKDError("--config is empty; name a configuration, or leave --config out")
        over = _read_sum(value, parts) if len(parts) > 1 else read_config(paths[0])
        if _names_method(over) and isinstance(result.get("model"), dict):
            result["model"].pop("method", None)  # also one of the same class, with other arguments
        result = merge(result, over)
        names += [_run_name(path) for path in paths]
    return result, "+".join(names)


def _names_method(settings: dict[str, Any]) -> bool:
    """Whether settings name the class of a method."""
    model = settings.get("model")
    method = model.get("method") if isinstance(model, dict) else None
    return isinstance(method, dict) and "class_path" in method


def _run_name(path: Path) -> str:
    """Stem of a configuration; for the ``config.yaml`` of a run, the name of the run's own configuration."""
    of_a_run = path.name == "config.yaml" and (path.parent / "checkpoints").is_dir()
    return path.resolve().parents[1].name if of_a_run else path.stem
