"""Tables as YAML files: pairs of networks, rows of methods, and the figures of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ackd_lightning.config.files import (
    config_folder,
    config_parts,
    describe_config,
    find_config,
    method_names,
    read_yaml,
)
from ackd_lightning.errors import ACKDError, near_matches

TeacherKind = Literal["teacher", "early_stopped", "assistant", "guides", "itself"]
TEACHER_KINDS: tuple[TeacherKind, ...] = ("teacher", "early_stopped", "assistant", "guides", "itself")
SCHEDULES: dict[str, dict[str, Any]] = {
    "eskd": {"method": "kd", "teacher": "early_stopped"},
    "takd": {"method": "kd", "teacher": "assistant"},
    "dgkd": {"teacher": "guides"},
    "ceskd": {"teacher": "guides"},
    "aikd": {"teacher": "itself"},
}
"""Rows that need further runs: KD from an early-stopped teacher, KD from the last assistant, methods that learn from
the teacher and all assistants, and a student that learns from itself, trained alone before."""
METRICS = ("acc", "acc_top5")
_TABLE_KEYS = {"metrics", "error", "proxies", "set", "teacher_set", "student_set", "pairs", "rows"}
_PAIR_KEYS = {"config", "assistants", "early_stop", "paper", "rows"}
_ROW_KEYS = {"method", "teacher", "label", "set"}


@dataclass(frozen=True)
class Pair:
    """A teacher and a student on a data set.

    Attributes:
        name: Name, such as ``resnet110_resnet20``.
        config: Configuration of its ACKD run.
        assistants: Networks between the two, the largest first. Each learns by KD from the one before it, the first
            from the teacher.
        early_stop: Epoch of the configured schedule at which ESKD's teacher stops.
        paper: Figures in percent by row, in the order of the metrics; named figures for a table of proxies.
        rows: Dotted settings of this pair's runs by row, such as the weights that a method's authors use for it.
    """

    name: str
    config: Path
    assistants: tuple[str, ...] = ()
    early_stop: int | None = None
    paper: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def figure(self, row: str, metric: int) -> float | None:
        """Figure of the paper; None where it has none.

        Args:
            row: Name of the row.
            metric: Index of the metric.
        """
        value = self.paper.get(row)
        if isinstance(value, Sequence):
            value = value[metric]
        return None if value is None or (metric and not isinstance(self.paper.get(row), Sequence)) else float(value)


@dataclass(frozen=True)
class Row:
    """A row of a table: a method and the network that it learns from.

    Attributes:
        name: Name, unique in the table.
        method: Fragment of ``configs/methods``, or several joined by ``+``, whose losses are added.
        teacher: The teacher, the early-stopped teacher, the last assistant, the teacher and all assistants, or the
            student itself, trained alone before.
        label: Printed name.
        settings: Dotted settings of its runs.
    """

    name: str
    method: str
    teacher: TeacherKind = "teacher"
    label: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TableSpec:
    """A table to fill.

    Attributes:
        name: Stem of the file name.
        title: First comment of the file.
        metrics: ``acc``, ``acc_top5``.
        error: Whether the figures are errors (100 - accuracy).
        proxies: Whether the table compares proxies of the teacher (Table 1) instead of accuracies.
        pairs: Pairs by name.
        rows: Rows by name, in printed order.
        settings: Dotted settings of every run.
        teacher_settings: Dotted settings of teachers.
        student_settings: Dotted settings of assistants and students.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    error: bool
    proxies: bool
    pairs: dict[str, Pair]
    rows: dict[str, Row]
    settings: dict[str, Any]
    teacher_settings: dict[str, Any]
    student_settings: dict[str, Any]


def table_names() -> list[str]:
    """Names of the packaged tables of the paper."""
    return sorted(path.stem for path in _folder().glob("table*.yaml"))


def _folder() -> Path:
    return config_folder() / "tables"


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    packaged = _folder() / (name if path.suffix else f"{name}.yaml")
    if packaged.is_file():
        return packaged
    raise ACKDError(f"table {name!r} does not exist; {near_matches(name, table_names())}, or name your own file")


def _read(path: Path, keys: set[str]) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("pairs"), dict):
        raise ACKDError(f"{path} is not a table; add `pairs` and `rows` as in configs/tables/table2.yaml")
    _refuse_unknown(content, keys, str(path))
    for key in keys & {"rows", "set", "teacher_set", "student_set"}:
        _require_mapping(content.get(key), f"`{key}` of {path}")
    if not isinstance(content.get("metrics") or [], list):
        raise ACKDError(f"`metrics` of {path} is {content['metrics']!r}; write a list such as [acc, acc_top5]")
    return content


def _require_mapping(value: Any, place: str) -> None:
    if value is not None and not isinstance(value, dict):
        raise ACKDError(f"{place} is {str(value)[:60]!r}; write `name: value` lines")


def _refuse_unknown(content: Mapping[str, Any], keys: set[str], place: str) -> None:
    for key in content:
        if key not in keys:
            raise ACKDError(f"{place} has no key {key!r}; {near_matches(str(key), sorted(keys))}")


def _pairs(content: Mapping[str, Any], path: Path) -> dict[str, Pair]:
    pairs: dict[str, Pair] = {}
    for name, given in content["pairs"].items():
        if not isinstance(given, dict) or "config" not in given:
            raise ACKDError(f"pair {name!r} of {path} has no `config`; name the configuration of its ACKD run")
        _refuse_unknown(given, _PAIR_KEYS, f"pair {name!r} of {path}")
        for key, kind, what in (
            ("config", str, "a name"),
            ("early_stop", int, "epochs"),
        ):
            if given.get(key) is not None and (not isinstance(given[key], kind) or given[key] in ("", 0, True)):
                raise ACKDError(f"`{key}` of pair {name!r} of {path} is {given[key]!r}; write {what}")
        assistants = given.get("assistants") or []
        if not isinstance(assistants, list) or not all(isinstance(each, str) and each for each in assistants):
            raise ACKDError(
                f"`assistants` of pair {name!r} of {path} is {assistants!r}; write a list of networks, "
                "the largest first"
            )
        if len(set(assistants)) < len(assistants):
            raise ACKDError(f"`assistants` of pair {name!r} of {path} names a network twice; name each once")
        _require_mapping(given.get("paper"), f"`paper` of pair {name!r} of {path}")
        _require_mapping(given.get("rows"), f"`rows` of pair {name!r} of {path}")
        for row, settings in (given.get("rows") or {}).items():
            _require_mapping(settings, f"row {row!r} of pair {name!r} of {path}")
        beside = path.parent / given["config"]
        config = beside if beside.is_file() else find_config(given["config"])
        rest = {key: value for key, value in given.items() if key != "config"}
        rest |= {"paper": rest.get("paper") or {}, "assistants": tuple(assistants), "rows": rest.get("rows") or {}}
        pairs[str(name)] = Pair(str(name), config, **rest)
    return pairs


def _check_figures(pairs: Mapping[str, Pair], metrics: Sequence[str], path: Path) -> None:
    for pair in pairs.values():
        for row, value in pair.paper.items():
            given = value if isinstance(value, list) else [value]
            numbers = all(each is None or isinstance(each, (int, float)) for each in given)
            if not numbers or (isinstance(value, list) and len(value) != len(metrics)):
                raise ACKDError(
                    f"pair {pair.name!r} of {path} has the figure {value!r} for {row!r}; write a number, or a list "
                    f"with one number for each of {', '.join(metrics)}"
                )


def _row(name: str, given: Mapping[str, Any] | None, place: str) -> Row:
    _require_mapping(given, f"row {name!r} of {place}")
    given = {**SCHEDULES.get(name, {}), **(given or {})}
    _refuse_unknown(given, _ROW_KEYS, f"row {name!r} of {place}")
    _require_mapping(given.get("set"), f"`set` of row {name!r} of {place}")
    method, kind = str(given.get("method", name)), given.get("teacher", "teacher")
    for part in config_parts(method):
        if f"{part}.yaml" not in method_names() and not Path(part).is_file():
            raise ACKDError(
                f"row {name!r} of {place} has the method {part!r}, which does not exist; "
                f"{near_matches(part, [each.removesuffix('.yaml') for each in method_names()])}"
            )
    if kind not in TEACHER_KINDS:
        kinds = ", ".join(TEACHER_KINDS)
        raise ACKDError(f"row {name!r} of {place} has the teacher {kind!r}; it must be one of {kinds}")
    return Row(name, method, kind, given.get("label", name), given.get("set") or {})


def read_table(name: str, preset: str | None = None) -> TableSpec:
    """Read a table.

    Args:
        name: ``table1`` .. ``table7``, or a file of the same form.
        preset: Packaged file (``smoke``) whose pairs and settings replace those of the table.

    Raises:
        ACKDError: When the file is not a valid table.
    """
    path = _find(name)
    content = _read(path, _TABLE_KEYS)
    pairs = _pairs(content, path)
    if preset is not None:
        over = _find(preset)
        laid_over = _read(over, {"pairs", "set", "teacher_set", "student_set"})
        pairs = _pairs(laid_over, over)
        content = {**content, "set": {}, "teacher_set": {}, "student_set": {}, **laid_over}
    metrics = tuple(content.get("metrics", METRICS[:1]))
    for metric in metrics:
        if metric not in METRICS:
            raise ACKDError(f"{path} has the metric {metric!r}; {near_matches(str(metric), METRICS)}")
    if not content.get("proxies"):
        _check_figures(pairs, metrics, path)
    if not pairs:
        raise ACKDError(f"{path} has no pairs; add one below `pairs`, as in configs/tables/table2.yaml")
    rows = {str(row): _row(str(row), given, str(path)) for row, given in (content.get("rows") or {}).items()}
    return TableSpec(
        name=path.stem if preset is None else f"{path.stem}-{preset}",
        title=describe_config(str(path)) + (f" (preset {preset}, other data)" if preset else ""),
        metrics=metrics,
        error=bool(content.get("error", False)),
        proxies=bool(content.get("proxies", False)),
        pairs=pairs,
        rows=rows,
        settings=content.get("set") or {},
        teacher_settings=content.get("teacher_set") or {},
        student_settings=content.get("student_set") or {},
    )


def choose(table: TableSpec, pairs: Sequence[str], methods: Sequence[str]) -> tuple[list[Pair], list[Row]]:
    """Choose pairs and rows; a method that the table lacks becomes a row without figures.

    Args:
        table: Table to choose from.
        pairs: Names of pairs; empty: all.
        methods: Rows of the table or method fragments; empty: all rows.

    Raises:
        ACKDError: When a name is unknown.
    """
    for pair in pairs:
        if pair not in table.pairs:
            raise ACKDError(f"{table.name} has no pair {pair!r}; {near_matches(pair, list(table.pairs))}")
    known = [*table.rows, *SCHEDULES, *(name.removesuffix(".yaml") for name in method_names())]
    for method in methods:
        for part in [method] if method in known else config_parts(method):
            if part not in known:
                raise ACKDError(f"--methods names {part!r}; {near_matches(part, known)}")
    rows = [table.rows.get(name) or _row(name, None, table.name) for name in dict.fromkeys(methods or table.rows)]
    return [table.pairs[name] for name in dict.fromkeys(pairs or table.pairs)], rows
