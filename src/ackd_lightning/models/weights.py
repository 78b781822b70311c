"""Weight files: reading every kind that a teacher or a student comes from, and writing ``.safetensors``."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError, count_of, first_names
from ackd_lightning.models.copies import clone, load_tensors
from ackd_lightning.models.heads import HeadedNetwork
from ackd_lightning.models.inception import say_transform, without_auxiliary
from ackd_lightning.models.weight_files import (
    damaged,
    first_bytes,
    is_safetensors,
    local_file,
    read_tensors,
    refuse_url,
    tell,
)
from ackd_lightning.plain import is_plain
from ackd_lightning.writing import whole_file

STUDENT_PREFIX = "student.backbone."
"""Prefix of the target learner's keys in this package's own Lightning checkpoints."""


def load_weights(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None) -> dict[str, str]:
    """Load the weights of a local file into a network whose keys and shapes are all those of the file.

    The file may be ``.safetensors``, a plain state dict saved by torch, a checkpoint of timm, Lightning and others
    that keeps its state dict under ``state_dict`` or ``model``, or a checkpoint of this package, of which only the
    target learner is loaded. A prefix that all names have in common is removed, and said unless it is that of
    ``DataParallel`` or ``torch.compile``. The format is recognised by the content, not by the name. Nothing in the
    file is executed (``weights_only=True``), and nothing is downloaded.

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
    load_tensors(model, tensors)
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
    file = local_file(path)
    tensors, metadata = read_tensors(file)
    if "head" in metadata and not isinstance(model, HeadedNetwork):
        what, whose = metadata.get("model", "a network"), metadata.get("method", "a method")
        raise ACKDError(
            f"{file} holds {what} with a head of {whose} in place of its own classifier; load its "
            ".safetensors file with ackd_lightning.load_student"
        )
    own = model.state_dict()
    tensors = own_names(tensors, own, str(file))
    if tensors.keys() != own.keys():
        tensors = as_torch_loads(tensors, model)
    check_fit(tensors, own, file, name or type(model).__name__)
    say_transform(model, metadata, str(file))
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
    file = refuse_url(path)
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
    try:
        with whole_file(file) as partial:
            partial.write_bytes(to_safetensors(tensors, metadata=notes))
    except OSError as error:
        raise ACKDError(
            f"{file} cannot be written ({error.strerror}); choose a folder that has room and that you may write to"
        ) from error
    return file


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of weights, with their names, as hexadecimal digits.

    Args:
        state: Tensors by name, in an order that is always the same; other values, as of quantised layers, by their
            tensors and their text.
    """
    found = hashlib.sha256()
    for key, value in state.items():
        found.update(key.encode())
        _add(value, found)
    return found.hexdigest()


def _add(value: Any, found: Any) -> None:
    """Add a value of a state dict to a digest."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.to_dense() if value.layout != torch.strided else value
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            found.update(str(key).encode())
            _add(each, found)
    elif isinstance(value, list | tuple):
        for each in value:
            _add(each, found)
    else:
        found.update((repr(value) if is_plain(value) else type(value).__name__).encode())


def digest(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a weight file, as hexadecimal text.

    Args:
        path: Weight file.
    """
    found = hashlib.sha256()
    with local_file(path).open("rb") as stream:
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
    file = local_file(path)
    if not is_safetensors(first_bytes(file)):
        raise ACKDError(
            f"{file} is not a .safetensors file, and only those have metadata; name one, or export the network again"
        )
    try:
        with safe_open(file, framework="pt") as handle:
            return dict(handle.metadata() or {})
    except SafetensorError as error:
        raise damaged(file, error) from error


def own_names(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Give the tensors of a file the names that a network has for them.

    Names are compared without one prefix, the one with which most of them agree: that of the target learner in a
    training checkpoint, of ``DataParallel`` and ``torch.compile``, and whatever another trainer put before them,
    which is said in one line. A prefix that the network's own names have is kept.

    Args:
        tensors: Tensors of the file by its own names.
        own: State dict of the network.
        file: Where the tensors come from, for messages.

    Returns:
        Tensors by new names; where no prefix helps, by those of the file.

    Raises:
        ACKDError: If the file holds several networks that fit equally well.
    """
    if not any("_orig_mod." in key for key in own):  # torch.compile
        tensors = {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}
    ends = {end for key in own for end in _ends(key)}
    fits: Counter[str] = Counter()
    for key, tensor in tensors.items():
        for end in _ends(key):
            if end in ends and end in own and own[end].shape[1:] == tensor.shape[1:]:
                fits[key.removesuffix(end)] += 1
    best = max(fits.values(), default=0)
    found = [prefix for prefix, count in fits.items() if count == best]
    if STUDENT_PREFIX in found:
        found = [STUDENT_PREFIX]
    if 2 * best < len(own) or fits[""] == best:
        return without_auxiliary(tensors, own, file)
    if len(found) > 1:
        raise ACKDError(
            f"{file} holds several networks that fit ({', '.join(map(repr, sorted(found)))}); re-save the tensors of "
            "one of them"
        )
    prefix = found[0]
    inside = {key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)}
    if prefix not in (STUDENT_PREFIX, "module."):
        others = len(tensors) - len(inside)
        rest = f", {others} others are not read" if others else ""
        tell(f"{file}: the names of {len(inside)} tensors are read without {prefix!r}{rest}")
    return without_auxiliary(inside, own, file)


def _ends(key: str) -> list[str]:
    """Return a name and what is left of it after each of its dots."""
    parts = key.split(".")
    return [".".join(parts[number:]) for number in range(len(parts))]


def as_torch_loads(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Let torch complete and rename tensors as a strict ``load_state_dict`` does.

    Files that were saved before torch 0.4.1 have no ``num_batches_tracked``, and layers may read old names.

    Args:
        tensors: Tensors by the names of the network.
        model: Network; it is not changed.

    Returns:
        Tensors by the network's own keys; those that were given where torch refuses them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ghost = clone(model).to("meta")
            load_tensors(ghost, tensors, assign=True)
    except Exception:  # `check_fit` says what does not fit
        return dict(tensors)
    return {key: each for key, each in ghost.state_dict().items() if not each.is_meta}


def _read_channels(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], reshaped: Sequence[str]
) -> tuple[int, int] | None:
    """Channels of the images of a file and of a network, where they alone differ; otherwise None."""
    if len(reshaped) != 1:
        return None
    there, here = tensors[reshaped[0]].shape, own[reshaped[0]].shape
    same = len(there) == len(here) == 4 and (there[0], *there[2:]) == (here[0], *here[2:])
    return (there[1], here[1]) if same else None


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
    remedy = "give weights of this network, or the network of these weights"
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
    parts: list[str] = []
    if (size := _trained_at(tensors, own)) and not (missing or unexpected):
        option, side = size
        remedy = f"its images had {side} x {side} pixels, so build {name} with options {{{option}: {side}}}"
    if channels := _read_channels(tensors, own, reshaped):
        there, here = channels
        remedy = f"its images had {count_of(there, 'channel')} and {name} reads {here}, so set data.channels to {there}"
    if missing:
        parts.append(f"{len(missing)} of {len(own)} keys {_be(missing)} missing ({first_names(missing)})")
    if unexpected:
        found = f"{len(unexpected)} of the file's {len(tensors)} keys {_be(unexpected)} unexpected"
        parts.append(f"{found} ({first_names(unexpected)})")
    if reshaped:
        shapes = (f"{key} {tuple(tensors[key].shape)} for {tuple(own[key].shape)}" for key in reshaped)
        parts.append(f"{len(reshaped)} {'has' if len(reshaped) == 1 else 'have'} another shape ({first_names(shapes)})")
    raise ACKDError(f"{file} does not fit {name}: {', '.join(parts)}; {remedy}")


_POSITIONS = (
    ("pos_embed", "patch_embed.proj.weight", "img_size"),  # timm
    ("encoder.pos_embedding", "conv_proj.weight", "image_size"),  # torchvision
)
"""Positions and patches of transformers that are built for one image size, and the option that sets it."""


def _trained_at(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Return the option and the side of the square images that a transformer's weights were trained on.

    None if the positions agree, or are not those of square images.
    """
    for positions, patches, option in _POSITIONS:
        if not all(key in each for key in (positions, patches) for each in (tensors, own)):
            continue
        there, here = tensors[positions].shape, own[positions].shape
        if len(there) != 3 or len(here) != 3 or there[1] == here[1]:
            continue
        for others in range(3):  # tokens without a place in the image: class, distillation
            sides = [math.isqrt(max(shape[1] - others, 0)) for shape in (there, here)]
            if all(side * side == shape[1] - others for side, shape in zip(sides, (there, here), strict=True)):
                return option, sides[0] * tensors[patches].shape[-1]
    return None


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
