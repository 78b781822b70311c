"""Download of archives: verified, resumable, and unpacked in one step or not at all."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torchvision.datasets.utils import calculate_md5

from ackd_lightning.data.messages import on_first_process, say
from ackd_lightning.data.stored import ROOT, StoredDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.validation import checked

_CHUNK = 1 << 18
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 3
_AGENT = "ackd-lightning"


@dataclass(frozen=True)
class Archive:
    """The official archive of a data set.

    Attributes:
        name: Name of the data set.
        url: Official address.
        filename: Name of the file on disk.
        md5: Published checksum (it guards against damage; nothing in the archive is executed).
        size: Length in bytes.
    """

    name: str
    url: str
    filename: str
    md5: str
    size: int


class _InterruptedError(Exception):
    """The transfer ended early; the bytes that arrived are kept."""


def _progress(what: str) -> Progress:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not sys.stderr.isatty() or not on_first_process(), transient=True)


def _copy(source: IO[bytes], target: IO[bytes], *, what: str, done: int, total: int | None) -> None:
    """Copy to the end; raise `_InterruptedError` when fewer bytes arrive than were announced."""
    with _progress(what) as bar:
        task = bar.add_task(what, total=total, completed=done)
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            done += len(chunk)
            bar.advance(task, len(chunk))
    if total is not None and done < total:
        raise _InterruptedError(f"the connection closed after {done:,} of {total:,} bytes")


def _transfer(url: str, part: Path, what: str) -> bool:
    """Fetch ``url`` into ``part``, resuming after the bytes that exist if the server can.

    Returns:
        Whether earlier bytes were kept.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": _AGENT})
    if have and urlsplit(url).scheme != "file":
        request.add_header("Range", f"bytes={have}-")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            resumed = answer.status == 206 and str(answer.headers.get("Content-Range", "")).startswith(f"bytes {have}-")
            if answer.status == 206 and not resumed:
                os.truncate(part, 0)  # it stays this process's file
                raise _InterruptedError("the server answered with another range of bytes than asked")
            announced = answer.headers.get("Content-Length")
            start = have if resumed else 0
            total = start + int(announced) if announced is not None else None
            with part.open("ab" if resumed else "wb") as target:
                _copy(answer, target, what=what, done=start, total=total)
            return resumed
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing left to send: the part is complete, or too long
            return True
        raise


def fetch(archive: Archive, folder: Path, *, url: str | None = None) -> Path:
    """Download an archive into ``folder`` unless it exists there, and verify it.

    Bytes go to a ``.part`` file that a later call resumes; the file gets its name only once its checksum is right.
    A process waits while another one downloads the same file, except on systems without locks for files.

    Args:
        archive: Archive to fetch.
        folder: Folder for the file.
        url: Mirror (http, https or file); None takes the official address.

    Returns:
        The file.

    Raises:
        ACKDError: If the archive cannot be downloaded.
    """
    path = folder / archive.filename
    if path.exists():
        verify(path, archive)
        return path
    address = url or archive.url
    if urlsplit(address).scheme not in {"http", "https", "file"}:
        raise ACKDError(f"url {address!r} is not a web address: use one that starts with https://, http:// or file://")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with _alone(part, archive.name):
            if not path.exists():
                _fetch(archive, address, path, part)
                return path
    except (OSError, http.client.HTTPException, _InterruptedError) as error:
        reason = str(error) or type(error).__name__
        raise ACKDError(
            f"could not download {archive.name} from {address} ({reason}): run it again to resume, "
            f"set url to a mirror, or put the file at {path}"
        ) from None
    verify(path, archive)
    return path


@contextmanager
def _alone(part: Path, name: str) -> Iterator[None]:
    """Wait until no other process writes a part, and keep others from it; an empty one is removed at the end."""
    try:
        import fcntl
    except ImportError:  # Windows, where an open file could not be renamed either
        yield
        return
    while True:
        with part.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that downloads {name} to {part}")
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError:
                pass  # some network file systems have no locks
            if not _is(part, stream):  # the other process has finished, and renamed or removed it
                continue
            try:
                yield
            finally:
                if _is(part, stream) and not part.stat().st_size:
                    part.unlink()
            return


def _is(path: Path, stream: IO[bytes]) -> bool:
    """Whether a path is still that of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _fetch(archive: Archive, address: str, path: Path, part: Path) -> None:
    left = _ATTEMPTS
    while True:
        left -= 1
        try:
            resumed = _transfer(address, part, f"downloading {archive.name}")
        except urllib.error.HTTPError:
            raise
        except (_InterruptedError, TimeoutError, ConnectionError, http.client.IncompleteRead):
            if not left:
                raise
            continue
        found = calculate_md5(part)
        if found == archive.md5:
            part.replace(path)
            return
        size = part.stat().st_size
        os.truncate(part, 0)
        if not resumed:
            raise OSError(f"the file has {size:,} bytes and checksum {found} instead of {archive.md5}")
        left = max(left, 1)  # old and new bytes may not belong together: start again once


def verify(path: Path, archive: Archive) -> None:
    """Raise an `ACKDError` unless a file is the official archive.

    Args:
        path: The file.
        archive: Archive that it must be.
    """
    found = calculate_md5(path)
    if found != archive.md5:
        size = path.stat().st_size
        raise ACKDError(
            f"{path} is not the official file of {archive.name} ({size:,} of {archive.size:,} bytes, checksum {found} "
            f"instead of {archive.md5}): it is incomplete or damaged, so delete it and download it again"
        )


def extract(path: Path, target: Path) -> None:
    """Unpack a tar or zip archive as a folder that appears only once it is complete.

    Where the archive holds a single folder, the content of that folder is taken. A folder that another process has
    unpacked in the meantime is left as it is.

    Args:
        path: Archive.
        target: Folder to create.

    Raises:
        ACKDError: If the archive is damaged, would write outside the folder, or the folder exists and is not whole.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-unpacking-", dir=target.parent))
    try:
        _unpack(path, staging)
        entries = [entry for entry in staging.iterdir() if not entry.name.startswith(("._", "__MACOSX"))]
        inner = entries[0] if len(entries) == 1 and entries[0].is_dir() else staging
        inner.chmod(0o755)  # mkdtemp makes folders private
        _put(inner, target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise ACKDError(
            f"could not unpack {path} to {target} ({reason}): delete the archive to download it again, or make room"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put(inner: Path, target: Path) -> None:
    """Give a folder its name, unless one with the same entries has it already."""
    try:
        inner.replace(target)
    except OSError:
        if not target.is_dir():
            raise
        missing = sorted({each.name for each in inner.iterdir()} - {each.name for each in target.iterdir()})
        if missing:
            raise ACKDError(f"{target} exists and lacks {missing[0]} of the archive: delete it or move it") from None


def _unpack(path: Path, staging: Path) -> None:
    if not zipfile.is_zipfile(path):
        with tarfile.open(path) as tar:
            if hasattr(tarfile, "data_filter"):
                tar.extractall(staging, filter="data")  # no absolute paths, no "..", no links or devices outside
            else:
                _write_files(tar, staging)
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            _place_in(staging, name)
        archive.extractall(staging)


def _place_in(folder: Path, name: str) -> Path:
    """Return where a member of an archive is written, which has to be in the folder."""
    place = (folder / name).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise OSError(f"its member {name!r} would be written outside the folder")
    return place


def _write_files(tar: tarfile.TarFile, staging: Path) -> None:
    """Write the files and folders of an archive; Python before 3.10.12 and 3.11.4 has no filters for archives."""
    for member in tar:
        place = _place_in(staging, member.name)
        if member.isdir():
            place.mkdir(parents=True, exist_ok=True)
        elif member.isreg():
            place.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, place.open("wb") as file:  # type: ignore[union-attr]
                shutil.copyfileobj(source, file)
        else:
            version = ".".join(map(str, sys.version_info[:3]))
            raise tarfile.ExtractError(f"its member {member.name!r} is no file, which Python {version} cannot check")


class DownloadedDataModule(StoredDataModule):
    """A data set that can be downloaded.

    Args:
        root: Folder of the archive or of the unpacked data set.
        download: Whether to download the archive when the data do not exist.
        url: Mirror (http, https or file) of the official archive, with the same checksum; None takes the official one.
        options: Argument ``cache``, and those of [`ImageDataModule`][ackd_lightning.data.ImageDataModule].
    """

    archive: Archive

    @checked
    def __init__(
        self, root: str | Path = ROOT, *, download: bool = True, url: str | None = None, **options: Any
    ) -> None:
        super().__init__(root, **options)
        self.download = download
        self.url = url

    def _archive_file(self) -> Path:
        """Return the verified archive, downloaded if necessary and allowed."""
        path = self.root / self.archive.filename
        if not self.download and not path.exists():
            raise ACKDError(
                f"{self.archive.name} is not in {self.root}: put {self.archive.filename} or the unpacked folder there, "
                "or set download: true"
            )
        return fetch(self.archive, self.root, url=self.url)
