"""Read YAML of plain data: mappings, lists, text, numbers; write settings as such."""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from typing import Any

import yaml

from ackd_lightning.errors import ACKDError

_DEEPEST, _MOST = 50, 100_000
"""Largest number of levels and of values in a YAML file; an alias counts as often as it is used."""


def _words_are_text(loader: Any) -> Any:
    """Return a loader to which ``on``, ``off``, ``yes`` and ``no`` are text, as they are in YAML 1.2."""
    words = {
        first: [(tag, pattern) for tag, pattern in kinds if first not in "yYnNoO" or not tag.endswith(":bool")]
        for first, kinds in loader.yaml_implicit_resolvers.items()
    }
    return type(loader.__name__, (loader,), {"yaml_implicit_resolvers": words})


_LOADERS = [_words_are_text(getattr(yaml, name)) for name in ("CSafeLoader", "SafeLoader") if hasattr(yaml, name)]


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain data, in C where PyYAML has that.

    Args:
        text: YAML. As in YAML 1.2, ``true`` and ``false`` alone are booleans: ``off`` is a value of several settings.

    Raises:
        yaml.YAMLError: With the line, if it is not YAML.
    """
    for loader in _LOADERS[:-1]:
        with contextlib.suppress(Exception):  # told by the other one, which counts lines as people do
            return _load(loader(text))
    return _load(_LOADERS[-1](text))


def _load(loader: Any) -> Any:
    """Construct the document of a loader, in which no mapping may have a key twice; PyYAML keeps the last one."""
    root = loader.get_single_node()
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            waiting += node.value
            continue
        waiting += [each for pair in node.value for each in pair]
        keys = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands there twice and the first one would be lost", key.start_mark
                )
            keys.add(name)
    return None if root is None else loader.construct_document(root)


def plain_settings(parser: Any, config: Any) -> dict[str, Any]:
    """Return parsed settings as plain data.

    Args:
        parser: Parser of jsonargparse, which writes text such as ``1e3`` as a number; here it stays text.
        config: Settings that it returned.
    """
    kept: dict[str, Any] = _keep_text(parse_yaml(parser.dump(config, skip_unset=False)), config.as_dict())
    return kept


def _keep_text(written: Any, parsed: Any) -> Any:
    if isinstance(written, dict) and isinstance(parsed, dict):
        return {key: _keep_text(value, parsed.get(key)) for key, value in written.items()}
    if isinstance(written, list) and isinstance(parsed, list | tuple) and len(written) == len(parsed):
        return [_keep_text(*pair) for pair in zip(written, parsed, strict=True)]
    return str(parsed) if isinstance(written, float) and isinstance(parsed, str | Path) else written


def first_reason(error: Exception) -> str:
    """Return what is wrong with a text, in the first line of the words of its reader.

    Args:
        error: Error of PyYAML or of another reader.
    """
    return getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain data: mappings, lists, text, numbers.

    Args:
        path: YAML file.

    Raises:
        ACKDError: When it cannot be read, is not YAML, or holds anything else.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ACKDError(f"{path} cannot be read ({error.strerror}); check its path and permissions") from error
    except Exception as error:  # PyYAML passes on whatever its constructors of numbers and dates raise
        first = first_reason(error)[:200]
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ACKDError(
            f"{path}{place} is not YAML ({first}); correct it, or print a valid one with --print_config"
        ) from None
    _check_plain(content, path)
    return content


def _check_plain(content: Any, path: Path) -> None:
    """Refuse what JSON cannot hold, and endless growth through aliases."""
    waiting, seen = [(content, 0)], 0
    while waiting:
        value, level = waiting.pop()
        seen += 1
        if level > _DEEPEST or seen > _MOST:
            raise ACKDError(f"{path} is nested too deeply or endlessly; remove its aliases (&, *)")
        if isinstance(value, dict):
            waiting += [(each, level + 1) for pair in value.items() for each in pair]
        elif isinstance(value, list):
            waiting += [(each, level + 1) for each in value]
        elif not isinstance(value, str | int | float | None):
            kind = "date" if isinstance(value, datetime.date) else type(value).__name__
            raise ACKDError(f"{path} holds the {kind} {str(value)[:40]!r}; put it in quotes, or use a number")
