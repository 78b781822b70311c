"""Content of weight files: tensors and metadata of every format, without running anything in them."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.hub import hub_file, is_hub_name
from ackd_lightning.models.metadata import as_text, of_other_programs


def refuse_url(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as a path, unless it is a URL."""
    text = os.fspath(path)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # a single letter is a drive, and a Path keeps only one slash
        raise ACKDError(f"{text} is a URL, and weights are read from local files only; download it and give its path")
    return Path(text).expanduser()


def local_file(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as the path of an existing file; the one in the cache for a name on the hub."""
    if is_hub_name(path):
        return hub_file(os.fspath(path))
    file = refuse_url(path)
    if file.is_dir():
        raise ACKDError(f"{file} is a folder; name the weight file in it")
    if not file.exists():
        raise ACKDError(f"weight file {file} does not exist; correct the path, or create the file first")
    return file


def first_bytes(file: Path) -> bytes:
    """Return the first bytes of ``file``."""
    try:
        with file.open("rb") as handle:
            return handle.read(64)
    except OSError as error:
        raise ACKDError(f"{file} cannot be read ({error.strerror}); check its permissions") from error


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins like ``.safetensors``: eight bytes of length, then JSON."""
    return head[8:9] == b"{"


def damaged(file: Path, error: Exception) -> ACKDError:
    """Make the error for a file that begins as it should but cannot be read to its end."""
    return ACKDError(
        f"{file} is truncated or is not a weight file ({type(error).__name__} while reading it); fetch or make it again"
    )


def read_tensors(file: Path, *, quiet: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a weight file, on the CPU, and its metadata.

    Args:
        file: Weight file.
        quiet: Whether to print nothing about what is chosen among its entries, since it is read again to be loaded.
    """
    head = first_bytes(file)
    if is_safetensors(head):
        try:
            with safe_open(file, framework="pt") as handle:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  not a mapping
                return _nothing_but_tensors(tensors, file), dict(handle.metadata() or {})
        except SafetensorError as error:
            raise damaged(file, error) from error
    if head.startswith((b"PK", b"\x80")):  # a zip archive, or a bare pickle as torch wrote it before 1.6
        return _split(_read_torch(file), file, (lambda _: None) if quiet else tell)
    if head.startswith(b"version https://git-lfs"):
        raise ACKDError(f"{file} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    what = "is empty" if not head else "is neither a .safetensors file nor one written by torch.save"
    raise ACKDError(f"{file} {what}; fetch or make the weight file again, or correct the path")


_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict")
_RAW = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params")
STATE_DICTS = (*_AVERAGED, *_RAW)
"""Entries of a checkpoint that may hold the state dict, in the order in which they are taken.

An average of the weights comes first, as in timm and torchvision, whose trainers measure and keep the average.
"""


def _plain_classes() -> list[Any]:
    """Classes of plain data that trainers write beside weights; making one of them runs nothing of the file's own."""
    allowed: list[Any] = [argparse.Namespace]
    for where in ("pathlib", "pathlib._local"):  # the second since Python 3.13
        allowed += [(pathlib.PurePosixPath, f"{where}.{name}") for name in ("PosixPath", "PurePosixPath")]
        allowed += [(pathlib.PureWindowsPath, f"{where}.{name}") for name in ("WindowsPath", "PureWindowsPath")]
    return allowed


def _read_torch(file: Path) -> Any:
    """Load a file of ``torch.save``; only tensors and plain data are allowed in it."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_plain_classes()):
            # for pickles of other programs, whose fault the error below names
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(
            r"GLOBAL ([\w.]+) was not an allowed global|Can only .* but got <class '([\w.]+)'>", str(error)
        )
        if refused is None:
            raise damaged(file, error) from error
        held = refused[1] or refused[2]
        raise ACKDError(
            f"{file} holds Python objects besides tensors ({held}), which the safe loader refuses; if you trust the "
            f"file, run `{_remedy(file)}`, and give NEW"
        ) from error
    except Exception as error:  # a damaged pickle or archive can fail in any way
        if "TorchScript" in str(error):
            raise ACKDError(
                f"{file} is a TorchScript program, not a state dict; run `torch.save(torch.jit.load(OLD, "
                "map_location='cpu').state_dict(), NEW)`, and give NEW"
            ) from error
        raise damaged(file, error) from error


def _remedy(file: Path) -> str:
    """Return the command that takes the state dict out of a file that the safe loader refuses."""
    load = "torch.load(OLD, map_location='cpu', weights_only=False)"
    kinds = _entries(file)
    if None in kinds:
        return f"torch.save({load}.state_dict(), NEW)"
    for entry in STATE_DICTS:
        if entry in kinds:
            return f"torch.save({load}[{entry!r}]{'.state_dict()' if kinds[entry] else ''}, NEW)"
    inside = _unusual_entry(list(_operations(file)))
    within = f"{load}[{inside!r}]" if inside else load
    return f"torch.save({{k: torch.as_tensor(v) for k, v in {within}.items() if hasattr(v, 'shape')}}, NEW)"


def _unusual_entry(operations: Sequence[tuple[str, Any]]) -> str | None:
    """Return the first text in a pickle that a mapping of tensors follows."""
    for number, (_, key) in enumerate(operations):
        begin = operations[number + 1 : number + 6]
        if isinstance(key, str) and begin and begin[0][0] != "BINGET" and _is_mapping(begin[0]):
            names = [at for at, (name, _) in enumerate(begin) if name == "BINUNICODE"]
            if names and any("_rebuild_" in str(argument) for _, argument in begin[names[0] + 1 : names[0] + 2]):
                return key
    return None


def _entries(file: Path) -> dict[str | None, bool]:
    """Return the text in a pickle, and whether an object follows it; None for a pickle that is itself an object.

    The instructions of the pickle are read and not carried out.
    """
    operations = list(_operations(file))
    found: dict[str | None, bool] = {None: True} if operations and not _is_mapping(operations[0]) else {}
    for (_, key), after, then in zip(operations, operations[1:], operations[2:], strict=False):
        # in the old format, the source of a class stands before it
        is_class = after[0] == "GLOBAL" or (after[1] == "module" and then[0] == "GLOBAL")
        if isinstance(key, str) and (is_class or _is_mapping(after)):
            found.setdefault(key, not _is_mapping(after))
    return found


def _is_mapping(operation: tuple[str, Any]) -> bool:
    """Whether an instruction begins a mapping, or names one that was begun before."""
    name, argument = operation
    return name in ("EMPTY_DICT", "BINGET", "LONG_BINGET") or (
        name == "GLOBAL" and str(argument) == "collections OrderedDict"
    )


def _operations(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the instructions of a pickle that matter here, with their arguments; none for what cannot be read."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
                content = archive.read(name)
        else:  # a number, the protocol and the machine precede the object, each in a pickle of its own
            content = file.read_bytes()
            stream = io.BytesIO(content)
            for _ in range(3):
                collections.deque(pickletools.genops(stream), maxlen=0)
            content = content[stream.tell() :]
        memory = ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PROTO", "FRAME", "MARK")
        for operation, argument, _ in pickletools.genops(content):
            if operation.name not in memory:
                yield operation.name, argument
    except Exception:  # of a damaged file; the command for any file is named then
        return


def _split(loaded: Any, file: Path, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Find the state dict in a loaded object, and turn the plain values beside it into text; say what is chosen."""
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    if not isinstance(loaded, Mapping):
        raise ACKDError(f"{file} holds a {type(loaded).__name__}; give a state dict, or a checkpoint that contains one")
    named = [entry for entry in STATE_DICTS if isinstance(loaded.get(entry), Mapping)]
    if named:
        beside = {key: _as_text(value) for key, value in loaded.items() if key != named[0]}
        notes, odd = of_other_programs({str(key): text for key, text in beside.items() if text is not None})
        for key in odd:
            say(f"{file}: its {key}, {beside[key]}, is not in the form of this package and is not read")
        notes |= own_notes(loaded.get("ackd_lightning"))
        others = [key for key, each in loaded.items() if key != named[0] and _is_state_dict(each)]
        if others:
            kind = " (an average of the weights)" if named[0] in _AVERAGED else ""
            unread = f"{', '.join(map(repr, others))} {'is' if len(others) == 1 else 'are'} not"
            say(f"{file} holds several state dicts: {named[0]!r}{kind} is read, {unread}")
        return _nothing_but_tensors(loaded[named[0]], file), notes
    inside = [key for key, each in loaded.items() if _is_state_dict(each)]
    if len(inside) > 1:
        raise ACKDError(
            f"{file} holds several state dicts ({', '.join(map(repr, inside))}); re-save the tensors of one of them"
        )
    if inside:
        say(f"{file}: the weights are read from its entry {inside[0]!r}")
        return dict(loaded[inside[0]]), {}
    return _nothing_but_tensors(loaded, file), {}


def own_notes(described: Any) -> dict[str, str]:
    """Return what a checkpoint of this package says of its network, as text: what an exported file says, too.

    Args:
        described: Entry ``ackd_lightning`` of the checkpoint; anything else says nothing.
    """
    if not isinstance(described, Mapping):
        return {}
    kept = ("model", "model_options", "head", "method", "class_names", "input_size", "mean", "std")
    facts = {key: described.get(key) for key in kept}
    if isinstance(images := described.get("preprocessing"), Mapping):
        facts = {**images, **facts}
    return as_text(facts)


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def tell(sentence: str) -> None:
    """Print a line once, in the first process of each machine.

    Args:
        sentence: The line.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(sentence, flush=True)


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
