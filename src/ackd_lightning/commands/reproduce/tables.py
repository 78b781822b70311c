"""Tables as YAML files: pairs of networks, rows of methods, and the figures of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ackd_lightning.commands.reproduce.specs import TEACHER_KINDS, Pair, Row, TableSpec
from ackd_lightning.config.files import (
    config_folder,
    config_parts,
    describe_config,
    find_config,
    method_names,
)
from ackd_lightning.config.yaml_files import read_yaml
from ackd_lightning.errors import ACKDError, near_matches

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
_SECTIONS = ("data", "model", "trainer")
_ROW_KEYS = {"method", "teacher", "label", "set"}


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
    _require_mapping(content.get("rows"), f"`rows` of {path}")
    for key in ("set", "teacher_set", "student_set"):
        _require_settings(content.get(key), f"`{key}` of {path}")
    if not isinstance(content.get("metrics") or [], list):
        raise ACKDError(f"`metrics` of {path} is {content['metrics']!r}; write a list such as [acc, acc_top5]")
    return content


def _require_mapping(value: Any, place: str) -> None:
    if value is not None and not isinstance(value, dict):
        raise ACKDError(f"{place} is {str(value)[:60]!r}; write `name: value` lines")


def _require_settings(value: Any, place: str) -> None:
    _require_mapping(value, place)
    for key in value or {}:
        section, dot, _ = str(key).partition(".")
        if dot and section not in _SECTIONS:
            raise ACKDError(f"{place} has the setting {key!r}; {near_matches(section, _SECTIONS)}")


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
        beside = path.parent / given["config"]
        config = beside if beside.is_file() else find_config(given["config"])
        rest = {key: value for key, value in given.items() if key != "config"}
        rows = _pair_rows(given.get("rows"), path, f"pair {name!r} of {path}")
        rest |= {"paper": rest.get("paper") or {}, "assistants": tuple(assistants), "rows": rows}
        pairs[str(name)] = Pair(str(name), config, **rest)
    return pairs


def _pair_rows(given: Any, path: Path, place: str) -> dict[str, dict[str, Any]]:
    """Settings of a pair's runs by row: written there, or in a file that several tables share."""
    if isinstance(given, str):
        files = [folder / f"{given}.yaml" for folder in (path.parent, _folder())]
        file = next((each for each in files if each.is_file()), None)
        if file is None:
            raise ACKDError(f"`rows` of {place} is {given!r} and {files[0]} does not exist; name a file of rows")
        given, place = read_yaml(file), f"{file}, `rows` of {place}"
    _require_mapping(given, f"`rows` of {place}")
    for row, settings in (given or {}).items():
        _require_settings(settings, f"row {row!r} of {place}")
    return {str(row): settings or {} for row, settings in (given or {}).items()}


def _refuse_unknown_rows(pairs: Mapping[str, Pair], rows: Mapping[str, Row], path: Path) -> None:
    known = _row_names(rows)
    for pair in pairs.values():
        for row in pair.rows:
            for part in [row] if row in known else config_parts(row):
                if part not in known:
                    raise ACKDError(
                        f"`rows` of pair {pair.name!r} of {path} names {part!r}; {near_matches(part, known)}"
                    )


def _row_names(rows: Mapping[str, Row]) -> list[str]:
    """Rows of a table, and every method that may become a row of it."""
    return [*rows, *SCHEDULES, *(name.removesuffix(".yaml") for name in method_names())]


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
    _require_settings(given.get("set"), f"`set` of row {name!r} of {place}")
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
    for key in ("error", "proxies"):
        if not isinstance(content.get(key, False), bool):
            raise ACKDError(f"`{key}` of {path} is {content[key]!r}; write true or false")
    metrics = tuple(content.get("metrics", METRICS[:1]))
    for metric in metrics:
        if metric not in METRICS:
            raise ACKDError(f"{path} has the metric {metric!r}; {near_matches(str(metric), METRICS)}")
    if not content.get("proxies"):
        _check_figures(pairs, metrics, path)
    if not pairs:
        raise ACKDError(f"{path} has no pairs; add one below `pairs`, as in configs/tables/table2.yaml")
    rows = {str(row): _row(str(row), given, str(path)) for row, given in (content.get("rows") or {}).items()}
    _refuse_unknown_rows(pairs, rows, path)
    return TableSpec(
        name=path.stem if preset is None else f"{path.stem}-{preset}",
        title=describe_config(str(path)) + (f" (preset {preset}, other data)" if preset else ""),
        metrics=metrics,
        error=content.get("error", False),
        proxies=content.get("proxies", False),
        pairs=pairs,
        rows=rows,
        settings=content.get("set") or {},
        teacher_settings=content.get("teacher_set") or {},
        student_settings=content.get("student_set") or {},
    )


def choose(
    table: TableSpec, pairs: Sequence[str], methods: Sequence[str], *, option: str = "--methods"
) -> tuple[list[Pair], list[Row]]:
    """Choose pairs and rows; a method that the table lacks becomes a row without figures.

    Args:
        table: Table to choose from.
        pairs: Names of pairs; empty: all.
        methods: Rows of the table or method fragments; empty: all rows.
        option: Option of the command that gives the rows, for messages.

    Raises:
        ACKDError: When a name is unknown.
    """
    for pair in pairs:
        if pair not in table.pairs:
            raise ACKDError(f"{table.name} has no pair {pair!r}; {near_matches(pair, list(table.pairs))}")
    known = _row_names(table.rows)
    for method in methods:
        for part in [method] if method in known else config_parts(method):
            if part not in known:
                raise ACKDError(f"{option} names {part!r}; {near_matches(part, known)}")
    rows = [table.rows.get(name) or _row(name, None, table.name) for name in dict.fromkeys(methods or table.rows)]
    return [table.pairs[name] for name in dict.fromkeys(pairs or table.pairs)], rows
