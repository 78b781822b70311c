"""What a weight file of this package states of its network, read without its tensors."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weight_files import first_bytes, is_safetensors, local_file, own_notes
from ackd_lightning.models.weights import read_metadata


def read_notes(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read what a file of this package states beside its tensors, without reading these.

    Args:
        path: ``.safetensors`` file, or checkpoint of a run.

    Returns:
        Text by name; empty for a file that does not exist, cannot be read, or is of another program.
    """
    with contextlib.suppress(ACKDError):
        file = local_file(path)
        if is_safetensors(first_bytes(file)):
            return read_metadata(file)
        with contextlib.suppress(Exception):  # what is wrong with a file is said when its tensors are read
            return own_notes(torch.load(file, mmap=True, map_location="cpu", weights_only=True)["ackd_lightning"])
    return {}


def stated_options(
    name: str, path: str | os.PathLike[str] | None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the options of `create_model` that a weight file states for a network, and those that are given.

    Args:
        name: Name of the network; a file of another network states nothing about it.
        path: Weight file; None for none.
        given: Options that count before those of the file.
    """
    notes = {} if path is None else read_notes(path)
    stated: Any = {}
    if notes.get("model") == name:
        with contextlib.suppress(ValueError):
            stated = json.loads(notes.get("model_options", "{}"))
    return {**(stated if isinstance(stated, dict) else {}), **(given or {})}
