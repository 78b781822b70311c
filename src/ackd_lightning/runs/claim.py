"""Claim the folder of a run for one process, so that no other process trains in it or removes it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.files import run_folder

LOCK_FILE = ".lock"
IN_USE = "by another process"
_ATTEMPTS = 100
"""Tries to enter a folder that other processes keep removing; each of them removes its own folder once."""


class _InUseError(Exception):
    """Another process holds the lock of the folder."""


class Claim:
    """A run's folder that this process holds until it calls `release`, leaves the ``with`` block, or ends.

    Only a process that made the folder and holds its lock ever removes it.

    Attributes:
        folder: Folder of the run.
        made: Whether this process made the folder.
    """

    def __init__(self, folder: Path, *, made: bool, lock: IO[str] | None, new_parents: tuple[Path, ...] = ()) -> None:
        self.folder, self.made = folder, made
        self._lock, self._new_parents = lock, new_parents

    @property
    def held(self) -> bool:
        """Whether this process holds the lock; always False where the file system has no locks."""
        return self._lock is not None and _is_lock_of(self._lock, self.folder)

    def discard(self) -> None:
        """Release the folder, and remove it if this process made it, holds it, and it has no checkpoint or summary."""
        if self.made and self.held and not has_results(self.folder):
            self._remove()
        self._close()

    def release(self) -> None:
        """Let other processes claim the folder; an empty one that this process made is removed."""
        if self.made and self.held and [each.name for each in self.folder.iterdir()] == [LOCK_FILE]:
            self._remove()
        self._close()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _remove(self) -> None:
        # Renamed first, in one step: a process that makes the same folder anew must not lose files to this removal.
        aside = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.{secrets.token_hex(4)}.removed")
        try:
            self.folder.rename(aside)
        except OSError:
            return
        shutil.rmtree(aside, ignore_errors=True)
        for parent in self._new_parents:
            with contextlib.suppress(OSError):  # not empty, or removed by another process
                parent.rmdir()

    def _close(self) -> None:
        if self._lock is not None:
            _unlock(self._lock)
            self._lock = None


def claim(parent: Path, name: str | None = None, *, resume: bool = False, option: str = "--name") -> Claim:
    """Make the folder of a run, or enter it, and lock it.

    ``mkdir`` decides which process made the folder. A run without a name gets a folder of its own, named after the
    time: ``20250131-235959``, or ``20250131-235959-2`` if that exists.

    Args:
        parent: Folder of the configuration's runs. It is made if it is missing.
        name: Name of the run's folder; None for a new folder that is named after the time.
        resume: Whether the folder may have checkpoints or a summary already.
        option: Option that names the folder, for messages.

    Returns:
        The claim, which is also a context manager. On file systems without locks it does not keep other processes
        out, and it removes nothing.

    Raises:
        ACKDError: If another process trains this run, if a new run's folder has results already, or if the folder
            cannot be written.

    Examples:
        >>> import tempfile
        >>> runs = tempfile.TemporaryDirectory()
        >>> with claim(Path(runs.name), "first") as mine:
        ...     mine.made, mine.folder.name
        (True, 'first')
        >>> (Path(runs.name) / "first").exists()  # nothing was written
        False
        >>> runs.cleanup()
    """
    failures = 0
    for each in _names(name):
        folder = parent / each
        missing = tuple(above for above in (parent, *parent.parents) if not os.path.lexists(above))
        try:
            made = _make(folder)
            if not made and name is None:
                continue
            if not made and not resume and has_results(folder):  # before the lock, which writes into the folder
                raise _exists(folder, option)
            lock = _locked(folder)
        except _InUseError:
            if name is None:
                continue
            raise _in_use(folder, option) from None
        except FileNotFoundError as error:  # another process removed the folder that it had made
            failures += 1
            if failures == _ATTEMPTS:
                raise _not_writable(folder, error, option) from error
            continue
        except OSError as error:
            raise _not_writable(folder, error, option) from error
        claimed = Claim(folder, made=made, lock=lock, new_parents=missing)
        if not made and not resume and has_results(folder):  # of a process that has ended in the meantime
            claimed.release()
            raise _exists(folder, option)
        return claimed
    raise AssertionError("names never end")


def has_results(folder: Path) -> bool:
    """Return whether a run's folder has a summary or a checkpoint.

    Args:
        folder: Folder of the run.
    """
    return (folder / "summary.json").exists() or any(folder.rglob("*.ckpt"))


def say_unfinished(checkpoint: Path) -> None:
    """Print that a checkpoint belongs to a run of ``ackd fit`` that has not finished, if it does.

    Args:
        checkpoint: Checkpoint file.
    """
    folder = run_folder(checkpoint)
    if not (folder / LOCK_FILE).is_file() or (folder / "summary.json").is_file():
        return
    state, then = "has not finished", f"; `ackd fit --resume {shlex.quote(str(folder))}` goes on"
    if _in_training(folder):
        state, then = "is being trained by another process", ""
    print(f"{folder} {state}, so this is its network so far{then}", flush=True)


def _in_training(folder: Path) -> bool:
    """Return whether another process holds the lock of a run's folder; False where the file system has no locks."""
    try:
        import fcntl

        with (folder / LOCK_FILE).open() as stream:  # shared, so that two commands that look do not see each other
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # Windows; a file that may not be read, or a file system without locks
        return False
    return False


def _names(name: str | None) -> Iterator[str]:
    """Yield the given name again and again, or names made of the time, each once."""
    if name is not None:
        yield from itertools.repeat(name)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    yield stamp
    yield from (f"{stamp}-{number}" for number in itertools.count(2))


def _make(folder: Path) -> bool:
    """Make a folder; False if it exists.

    Raises:
        FileNotFoundError: If a folder above it was removed.
        OSError: If it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # a file is in its place, or the folder that was there is gone already
        if (place := Path(error.filename)).is_file() or place.is_symlink():
            raise
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder)) from error
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _locked(folder: Path) -> IO[str] | None:
    """Lock a folder; None on systems without such locks.

    Raises:
        _InUseError: If another process holds the lock.
        FileNotFoundError: If the folder was removed.
        OSError: If it cannot be written.
    """
    stream = (folder / LOCK_FILE).open("a")  # unlike "w", leaves the time stamp of a file that exists
    try:
        import fcntl

        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # a command that looks whether the run is in training holds the lock for an instant
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        stream.close()
        return None
    except OSError as error:
        stream.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise _InUseError from None
        return None  # some network file systems have no locks
    if not _is_lock_of(stream, folder):
        stream.close()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    return stream


def _is_lock_of(stream: IO[str], folder: Path) -> bool:
    """Return whether an open lock file is still the one in the folder."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), (folder / LOCK_FILE).stat())
    except OSError:
        return False


def _unlock(stream: IO[str]) -> None:
    import fcntl  # a lock exists only where this module does

    with contextlib.suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_UN)  # also for processes that were forked from this one
    stream.close()


def _in_use(folder: Path, option: str) -> ACKDError:
    what = f"run {folder} is being trained" if option == "--name" else f"{folder} is being written"
    return ACKDError(f"{what} {IN_USE}; wait for it, or choose another {option}")


def _exists(folder: Path, option: str) -> ACKDError:
    if not (folder / "summary.json").exists() and (folder / "checkpoints" / "last.ckpt").is_file():
        if _in_training(folder):
            return _in_use(folder, option)
        return ACKDError(
            f"run {folder} exists and has not finished; continue it with --resume {shlex.quote(str(folder))}, or "
            f"choose another {option}"
        )
    return ACKDError(f"run {folder} exists; choose another {option}, or remove the folder")


def _not_writable(folder: Path, error: OSError, option: str) -> ACKDError:
    below = f"the run's folder {folder}, below --runs_dir," if option == "--name" else f"{option} {folder}"
    return ACKDError(f"{below} cannot be written ({error.strerror}); choose a folder that you may write in")
