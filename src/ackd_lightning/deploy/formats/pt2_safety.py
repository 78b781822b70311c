"""Check of a ``.pt2`` file before torch opens it: torch would unpickle objects and evaluate text that it may hold."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ackd_lightning.errors import ACKDError

_MEMBERS = re.compile(
    r"[^/]+/(data/(weights/(weight_\d+|model_weights_config\.json)"
    r"|constants/(tensor_\d+|model_constants_config\.json)|sample_inputs/model\.pt)"
    r"|models/model\.json|extra/[\w.]+|archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version"
    r"|\.storage_alignment)"
)
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchao|torchvision|higher_order)\.\w+(\.\w+)?"
    r"|torch\.sym_\w+|_operator\.\w+|math\.(ceil|floor|trunc)"
)
_GRAPH = re.compile(r"[\w.]*")
_TOKENS = re.compile(r"\s*('?)([A-Za-z_]\w*)\1|\s*[\d.]+|\s*[-+*/(),=<>]")
_WORDS = {"Symbol", "Integer", "Float", "Rational", "True", "False", "positive", "integer", "nonnegative", "real"}
_WORDS |= {
    "Add",
    "Mul",
    "Pow",
    "Mod",
    "Max",
    "Min",
    "Eq",
    "Ne",
    "Lt",
    "Le",
    "Gt",
    "Ge",
    "FloorDiv",
    "CeilDiv",
    "int_oo",
}
_FREE_TEXT = {"metadata", "in_spec", "out_spec", "doc", "module_call_graph", "torch_version", "as_string"}
"""Entries that torch reads as text or as JSON and never evaluates."""


def check_archive(path: Path) -> set[str]:
    """Refuse a file that holds anything but tensors and a graph of known operators.

    Args:
        path: ``.pt2`` file.

    Returns:
        Libraries of the operators, such as ``aten``.

    Raises:
        ACKDError: Naming what it holds.
        Exception: Any other error of a damaged archive.
    """
    libraries: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise _refused(path, "two members of one name")
        if other := next((name for name in names if not _MEMBERS.fullmatch(name)), None):
            raise _refused(path, f"the member {other}")
        for name in names:
            if name.endswith("_config.json"):
                _check_payload(path, json.loads(archive.read(name)))
            elif name.endswith("models/model.json"):
                libraries |= _check_graph(path, json.loads(archive.read(name)))
            elif name.endswith("sample_inputs/model.pt") and (content := archive.read(name)):
                try:
                    torch.load(io.BytesIO(content), weights_only=True)
                except Exception as error:  # of a pickle, in any way
                    raise _refused(path, "objects in its example") from error
        if (damaged := archive.testzip()) is not None:  # torch does not look at the checksums
            raise ValueError(f"the checksum of {damaged} is wrong")
    return libraries


def _refused(path: Path, what: str) -> ACKDError:
    return ACKDError(
        f"{path} holds {what[:80]}, which could run code when torch opens it; name a file that `ackd export` wrote"
    )


def _check_payload(path: Path, content: Mapping[str, Any]) -> None:
    for entry in content["config"].values():
        if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", str(entry["path_name"])):
            raise _refused(path, f"the object {entry['path_name']}")


def _check_graph(path: Path, content: Mapping[str, Any]) -> set[str]:
    if content.get("guards_code"):
        raise _refused(path, "code of guards")
    libraries: set[str] = set()
    for key, text in _texts(content, ""):
        if key == "target":
            operator = _OPERATORS.fullmatch(text)
            if operator is None or "__" in text:
                raise _refused(path, f"the operator {text}")
            libraries |= {operator[1]} - {None}
        if key == "expr_str" and not _is_expression(text):
            raise _refused(path, f"the expression {text}")
        if key not in ("target", "expr_str") and not _GRAPH.fullmatch(text):
            raise _refused(path, f"the name {text!r}")
    return libraries


def _texts(content: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text that torch may evaluate, with the name of its entry."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            if name not in _FREE_TEXT:
                yield "key", str(name)
                yield from _texts(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value, key)


def _is_expression(text: str) -> bool:
    """Whether a text is arithmetic over symbols, and nothing else."""
    position = 0
    while position < len(text.rstrip()):
        token = _TOKENS.match(text, position)
        if token is None:
            return False
        word = token[2]
        if word is not None and word not in _WORDS and not re.fullmatch(r"[suz]+f?\d+", word):
            return False
        position = token.end()
    return True
