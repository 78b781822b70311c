"""Weights on the Hugging Face Hub: ``hf:USER/NAME[@revision]`` wherever a weight file is taken, and nowhere else.

Nothing is fetched unless such a name is given, and only ``model.safetensors``. Networks are named by ``hf:FOLDER``,
which is a folder on disk.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from ackd_lightning.errors import ACKDError, first_line

HF = "hf:"
"""What begins the name of weights on the hub, and of a network in a folder."""
WEIGHTS = "model.safetensors"
"""File of a repository that is read."""
_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


def is_hub_name(text: str | os.PathLike[str]) -> bool:
    """Whether a weight file is named by a place on the hub.

    Args:
        text: Name of a weight file.

    Examples:
        >>> is_hub_name("hf:anna/student@v2"), is_hub_name("weights/student.safetensors")
        (True, False)
    """
    return os.fspath(text).startswith(HF)


def parse_repository(text: str) -> tuple[str, str | None]:
    """Split ``USER/NAME[@revision]``.

    Args:
        text: Name with or without ``hf:``.

    Returns:
        Name of the repository, and revision (None for the newest).

    Raises:
        ACKDError: If it is something else.

    Examples:
        >>> parse_repository("hf:anna/student@v2")
        ('anna/student', 'v2')
    """
    found = _NAME.fullmatch(text.removeprefix(HF))
    if found is None or ".." in text:
        raise ACKDError(f"{text!r} is not a name on the hub; write hf:USER/NAME or hf:USER/NAME@REVISION")
    return found["repo"], found["revision"]


@functools.cache
def hub_file(name: str) -> Path:
    """Fetch the weights of a repository once, or find them in the cache of huggingface_hub.

    Args:
        name: ``hf:USER/NAME[@revision]``.

    Returns:
        Path of ``model.safetensors`` in the cache.

    Raises:
        ACKDError: If there is no such repository, revision or file, it is private and there is no token, or the hub
            cannot be reached and the file is not in the cache.
    """
    from huggingface_hub import errors, hf_hub_download

    repository, revision = parse_repository(name)
    try:
        return Path(hf_hub_download(repository, WEIGHTS, revision=revision))
    except Exception as error:
        raise _explained(name, error, errors) from error


def _explained(name: str, error: Exception, errors: object) -> ACKDError:
    def is_a(*kinds: str) -> bool:
        return isinstance(error, tuple(getattr(errors, kind) for kind in kinds))

    if is_a("GatedRepoError"):
        return ACKDError(f"{name} asks for a permission; get it on the page of the repository, and set HF_TOKEN")
    if is_a("RepositoryNotFoundError"):
        return ACKDError(
            f"{name} does not exist or is private; correct the name, or set HF_TOKEN (or run `hf auth login`)"
        )
    if is_a("RevisionNotFoundError"):
        return ACKDError(f"{name} has no such revision; leave it out, or name a branch, tag or commit")
    if is_a("LocalEntryNotFoundError"):
        return ACKDError(f"{name} is not in the cache and the hub cannot be reached; connect, or give a local file")
    if is_a("EntryNotFoundError"):
        return ACKDError(f"{name} has no {WEIGHTS}, and only safetensors are read; name a repository that has it")
    reason = first_line(error)
    return ACKDError(f"{name} cannot be fetched ({reason}); try again, or give a local file")
