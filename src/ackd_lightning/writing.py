"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path, *, replace: bool = True, before: Callable[[], None] | None = None) -> Iterator[Path]:
    """Write a file whole or not at all.

    The caller writes to a hidden file in the same folder. When the block ends without an exception, the file gets the
    permissions of any new file, is flushed to the disk and replaces ``path`` in one step. A killed process, a full disk
    or an exception leaves what was at ``path`` before.

    Args:
        path: File to write. Missing folders are made.
        replace: Whether to replace a file that exists, also one that another process has made since the block began.
        before: Called when the hidden file is complete, before it replaces ``path``.

    Raises:
        FileExistsError: If there is a file and it is not to be replaced.

    Yields:
        Path of the hidden file.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> target = Path(folder.name) / "notes" / "first.txt"
        >>> with whole_file(target) as partial:
        ...     characters = partial.write_text("whole")
        >>> target.read_text(), len(list(target.parent.iterdir()))
        ('whole', 1)
        >>> folder.cleanup()
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    partial.touch()  # some writers, such as that of safetensors, make files that others cannot read
    mode = stat.S_IMODE(partial.stat().st_mode)
    partial.unlink()
    try:
        yield partial
        with contextlib.suppress(OSError):  # some network drives have no permissions
            partial.chmod(mode)
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        if before is not None:
            before()
        if not replace:
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            try:
                os.link(partial, path)  # in one step, unlike looking and then replacing
                return
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                pass
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_files(path: Path) -> Iterator[Path]:
    """Write a file and what belongs beside it whole or not at all, as `whole_file` does for one file.

    The caller writes into a hidden folder. When the block ends without an exception, its files replace those of the
    same names in the folder of ``path``, and ``path`` is the last one.

    Args:
        path: File to write. Missing folders are made.

    Yields:
        Path of the same name in the hidden folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    hidden.mkdir()
    try:
        yield hidden / path.name
        for file in sorted(hidden.iterdir(), key=lambda each: each.name == path.name):
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
            file.replace(path.with_name(file.name))
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def write_whole(text: str, path: Path, errors: str = "strict") -> None:
    """Write a text file (UTF-8) whole or not at all.

    Args:
        text: Content.
        path: File to write. Missing folders are made.
        errors: What happens to characters that UTF-8 does not have, as for ``open``.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)
