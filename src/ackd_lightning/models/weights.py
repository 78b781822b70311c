"""Weight files: reading every kind that a teacher or a student comes from, and writing ``.safetensors``."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import secrets
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.heads import HeadedNetwork

STUDENT_PREFIX = "student.backbone."
"""Prefix of the target learner's keys in this package's own Lightning checkpoints."""

_SHOWN = 3


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> dict[str, str]:
    """Load the weights of a local file into a network whose keys and shapes are all those of the file.

    The file may be ``.safetensors``, a plain state dict saved by torch, a checkpoint that keeps its state dict under
    ``model`` or ``state_dict`` (public teachers), or a Lightning checkpoint of this package, of which only the target
    learner is loaded. Prefixes of ``DataParallel`` and ``torch.compile`` are removed. The format is recognised by the
    content, not by the name. Nothing in the file is executed (``weights_only=True``), and nothing is downloaded.

    Args:
        model: Network to fill in place, on any device; unchanged when an error is raised.
        path: Weight file.
        name: Name of the network in error messages; its class by default.

    Returns:
        Metadata of the file as text: those of a ``.safetensors`` file, or the numbers and strings beside the state
        dict of a checkpoint (``epoch``, ``best_acc``, …).

    Raises:
        ACKDError: If the file does not exist, is not a weight file, holds other objects than tensors, or has other
            keys or shapes.
    """
    tensors, metadata = fitting_tensors(model, path, name=name)
    model.load_state_dict(tensors, strict=True)
    return metadata


def fitting_tensors(
    model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a local file and check that they fit a network, without loading them into it.

    Args:
        model: Network, which may be on the meta device; it is not changed.
        path: Weight file.
        name: Name of the network in error messages; its class by default.

    Returns:
        Tensors by the network's own keys, and the metadata of the file as text.

    Raises:
        ACKDError: If the file does not exist, is not a weight file, holds other objects than tensors, or has other
            keys or shapes.
    """
    file = _local_file(path)
    tensors, metadata = _read(file)
    if "head" in metadata and not isinstance(model, HeadedNetwork):
        what, whose = metadata.get("model", "a network"), metadata.get("method", "a method")
        raise ACKDError(
            f"{file} holds {what} with a head of {whose} in place of its own classifier; load it with "
            "ackd_lightning.load_student"
        )
    own = model.state_dict()
    tensors = _without_prefixes(tensors, own)
    check_fit(tensors, own, file, name or type(model).__name__)
    return tensors, metadata


def save_weights(
    source: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write weights as ``.safetensors``; at every moment ``path`` is the complete old file or the complete new one.

    The bytes are written to a hidden file in the same folder, which replaces ``path`` once they are on the disk.
    Missing folders are created. Tensors that share memory are written separately.

    Args:
        source: Network, or its state dict.
        path: File to write.
        metadata: Text about the weights, such as accuracy, data, seed, epochs and versions.

    Returns:
        Path of the file.

    Raises:
        ACKDError: If the path is a URL or a folder, or cannot be written, or metadata are not text.
    """
    file = _refuse_url(path)
    notes = dict(metadata or {})
    for key, note in notes.items():
        if not isinstance(key, str) or not isinstance(note, str):
            raise ACKDError(
                f"metadata {key!r} for {file} is a {type(note).__name__}; safetensors stores text, so pass str(...)"
            )
    state = source.state_dict() if isinstance(source, nn.Module) else source
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        # clone: safetensors refuses tensors that share memory
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
    if file.is_dir():
        raise ACKDError(
            f"{file} is a folder; name the weight file to write in it, such as {file / 'weights.safetensors'}"
        )
    partial = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as handle:
            handle.write(to_safetensors(tensors, metadata=notes))
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(file)
    except OSError as error:
        raise ACKDError(
            f"{file} cannot be written ({error.strerror}); choose a folder that has room and that you may write to"
        ) from error
    finally:
        if partial.is_file():
            partial.unlink()
    return file


def digest(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a weight file, as hexadecimal text.

    Args:
        path: Weight file.
    """
    found = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a ``.safetensors`` file without its tensors.

    Args:
        path: Weight file.

    Returns:
        Metadata as text; empty if the file has none.

    Raises:
        ACKDError: If the file does not exist or is not ``.safetensors``.
    """
    file = _local_file(path)
    if not _is_safetensors(_head(file)):
        raise ACKDError(
            f"{file} is not a .safetensors file, and only those have metadata; name one, or export the network again"
        )
    try:
        with safe_open(file, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _refuse_url(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as a path, unless it is a URL."""
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # a single letter is a drive, and a Path keeps only one slash
        raise ACKDError(f"{text} is a URL, and weights are read from local files only; download it and give its path")
    return Path(text).expanduser()


def _local_file(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as the path of an existing file."""
    file = _refuse_url(path)
    if file.is_dir():
        raise ACKDError(f"{file} is a folder; name the weight file in it")
    if not file.exists():
        raise ACKDError(f"weight file {file} does not exist; correct the path, or create the file first")
    return file


def _head(file: Path) -> bytes:
    """Return the first bytes of ``file``."""
    try:
        with file.open("rb") as handle:
            return handle.read(64)
    except OSError as error:
        raise ACKDError(f"{file} cannot be read ({error.strerror}); check its permissions") from error


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins like ``.safetensors``: eight bytes of length, then JSON."""
    return head[8:9] == b"{"


def _damaged(file: Path, error: Exception) -> ACKDError:
    """Make the error for a file that begins as it should but cannot be read to its end."""
    return ACKDError(
        f"{file} is truncated or is not a weight file ({type(error).__name__} while reading it); fetch or make it again"
    )


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of ``file``, on the CPU, and its metadata."""
    head = _head(file)
    if _is_safetensors(head):
        try:
            with safe_open(file, framework="pt") as handle:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  not a mapping
                return _nothing_but_tensors(tensors, file), dict(handle.metadata() or {})
        except SafetensorError as error:
            raise _damaged(file, error) from error
    if head.startswith((b"PK", b"\x80")):  # a zip archive, or a bare pickle as torch wrote it before 1.6
        return _split(_read_torch(file), file)
    if head.startswith(b"version https://git-lfs"):
        raise ACKDError(f"{file} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    what = "is empty" if not head else "is neither a .safetensors file nor one written by torch.save"
    raise ACKDError(f"{file} {what}; fetch or make the weight file again, or correct the path")


def _read_torch(file: Path) -> Any:
    """Load a file of ``torch.save``; only tensors and plain data are allowed in it."""
    try:
        with warnings.catch_warnings():
            # for pickles of other programs, whose fault the error below names
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error))
        if refused is None:
            raise _damaged(file, error) from error
        held = refused[1]
        remedy = "if you trust the file, re-save only its 'model' entry (the state dict), and give that file"
        if held == "argparse.Namespace":  # harmless, and part of every `_last.pth` of the public teachers
            remedy = (
                "re-save only its 'model' entry, `with torch.serialization.safe_globals([argparse.Namespace]): "
                "torch.save({'model': torch.load(OLD, weights_only=True)['model']}, NEW)`, and give NEW"
            )
        raise ACKDError(
            f"{file} holds Python objects besides tensors ({held}), which the safe loader refuses; {remedy}"
        ) from error
    except Exception as error:  # a damaged pickle or archive can fail in any way
        raise _damaged(file, error) from error


def _split(loaded: Any, file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find the state dict in a loaded object, and turn the plain values beside it into text."""
    if not isinstance(loaded, Mapping):
        raise ACKDError(f"{file} holds a {type(loaded).__name__}; give a state dict, or a checkpoint that contains one")
    for entry in ("state_dict", "model"):
        inner = loaded.get(entry)
        if isinstance(inner, Mapping):
            beside = {key: _as_text(value) for key, value in loaded.items() if key != entry}
            notes = {str(key): text for key, text in beside.items() if text is not None}
            return _nothing_but_tensors(inner, file), notes
    return _nothing_but_tensors(loaded, file), {}


def _as_text(value: Any) -> str | None:
    """Return a number, a string or a tensor with one number as text, and None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return str(value) if isinstance(value, str | int | float) else None


def _nothing_but_tensors(state: Mapping[Any, Any], file: Path) -> dict[str, Tensor]:
    """Return ``state`` as a dict after checking that every value is a tensor with a name."""
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ACKDError(
                f"{file} is not a state dict, because its entry {key!r} is a {type(value).__name__}; "
                "give a state dict, or a checkpoint with one under 'model' or 'state_dict'"
            )
    if not state:
        raise ACKDError(f"{file} holds no tensors; make the weight file again, or correct the path")
    return dict(state)


def _without_prefixes(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the target learner out of a training checkpoint, and remove the prefixes that wrappers add to keys.

    A prefix that the network's own keys have is kept.
    """
    if not any("_orig_mod." in key for key in own):  # torch.compile
        tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}
    if all(key.startswith("module.") for key in tensors) and not any(key.startswith("module.") for key in own):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}  # DataParallel
    student = {key.removeprefix(STUDENT_PREFIX): tensors[key] for key in tensors if key.startswith(STUDENT_PREFIX)}
    return tensors if not student or any(key.startswith(STUDENT_PREFIX) for key in own) else student


def check_fit(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], file: Path, name: str) -> None:
    """Compare the tensors of a file with those of a network.

    Args:
        tensors: Tensors of the file by key.
        own: State dict of the network.
        file: Weight file, for the error message.
        name: Name of the network in the error message.

    Raises:
        ACKDError: If keys or shapes differ.
    """
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    reshaped = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if not (missing or unexpected or reshaped):
        return
    if reshaped and not (missing or unexpected):
        head = next(reversed(list(own))).rpartition(".")[0]  # the classifier is the last module with weights
        rows = [(tensors[key].shape, own[key].shape) for key in reshaped if key.rpartition(".")[0] == head]
        if len(rows) == len(reshaped) and all(there[1:] == here[1:] and there and here for there, here in rows):
            raise ACKDError(
                f"{file} has {rows[0][0][0]} classes and {name} has {rows[0][1][0]}, everything else agrees; build "
                f"{name} with num_classes={rows[0][0][0]}, or give weights for {rows[0][1][0]} classes"
            )
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} keys are missing ({_first(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} of the file's {len(tensors)} keys are unexpected ({_first(unexpected)})")
    if reshaped:
        shapes = (f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}" for key in reshaped)
        parts.append(f"{len(reshaped)} have another shape ({_first(shapes)})")
    raise ACKDError(
        f"{file} does not fit {name}: {', '.join(parts)}; give weights of this network, or the network of these weights"
    )


def _first(names: Iterable[str]) -> str:
    """Join the first few of ``names``."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (", …" if len(listed) > _SHOWN else "")
