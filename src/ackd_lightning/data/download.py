"""Fetching archives: verified, resumable, and unpacked in one step or not at all."""

from __future__ import annotations

import http.client
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torchvision.datasets.utils import calculate_md5

from ackd_lightning.data.base import (
    BATCH_SIZE,
    EVAL_BATCH_SIZE,
    ROOT,
    VAL_FRACTION,
    ImageDataModule,
)
from ackd_lightning.data.images import on_first_process
from ackd_lightning.errors import ACKDError

_CHUNK = 1 << 18
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 3
_AGENT = "ackd-lightning"


@dataclass(frozen=True)
class Archive:
    """An official file.

    Attributes:
        name: what people call the data set.
        url: where its makers keep it.
        filename: name on disk.
        md5: checksum published with it (it guards against damage; nothing in the archive is executed).
        size: length in bytes.
    """

    name: str
    url: str
    filename: str
    md5: str
    size: int


class _InterruptedError(Exception):
    """The transfer ended early; what has arrived is kept."""


def _progress(what: str) -> Progress:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not sys.stderr.isatty() or not on_first_process(), transient=True)


def _copy(source: IO[bytes], target: IO[bytes], *, what: str, done: int, total: int | None) -> None:
    """Copy to the end; raise `_InterruptedError` when fewer bytes come than were announced."""
    with _progress(what) as bar:
        task = bar.add_task(what, total=total, completed=done)
        while chunk := source.read(_CHUNK):
            target.write(chunk)
            done += len(chunk)
            bar.advance(task, len(chunk))
    if total is not None and done < total:
        raise _InterruptedError(f"the connection closed after {done:,} of {total:,} bytes")


def _transfer(url: str, part: Path, what: str) -> bool:
    """Fetch ``url`` into ``part``, going on after the bytes that are there if the server can.

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
                part.unlink()
                raise _InterruptedError("the server answered with another range of bytes than asked")
            announced = answer.headers.get("Content-Length")
            start = have if resumed else 0
            total = start + int(announced) if announced is not None else None
            with part.open("ab" if resumed else "wb") as target:
                _copy(answer, target, what=what, done=start, total=total)
            return resumed
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing left to send: complete, or longer than the file
            return True
        raise


def fetch(archive: Archive, folder: Path, *, url: str | None = None) -> Path:
    """Download an archive into ``folder`` unless it is there, and verify it.

    Bytes go to a ``.part`` file that a later call goes on with; the file gets its name only once its checksum is right.

    Args:
        archive: what to fetch.
        folder: where to.
        url: a mirror (http, https or file) instead of the official address.

    Returns:
        The file.

    Raises:
        ACKDError: if it cannot be had, with what to do instead.
    """
    path = folder / archive.filename
    if path.exists():
        verify(path, archive)
        return path
    address = url or archive.url
    if urlsplit(address).scheme not in {"http", "https", "file"}:
        raise ACKDError(f"url {address!r} is not a web address: use one that starts with https://, http:// or file://")
    try:
        _fetch(archive, address, path)
    except (OSError, http.client.HTTPException, _InterruptedError) as error:
        reason = str(error) or type(error).__name__
        raise ACKDError(
            f"could not download {archive.name} from {address} ({reason}): run it again to go on where it stopped, "
            f"set url to a mirror, or put the file at {path}"
        ) from None
    return path


def _fetch(archive: Archive, address: str, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
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
        part.unlink()
        if not resumed:
            raise OSError(f"the file has {size:,} bytes and checksum {found} instead of {archive.md5}")
        left = max(left, 1)  # old and new bytes may not belong together: once more from the start


def verify(path: Path, archive: Archive) -> None:
    """Raise an `ACKDError` unless ``path`` is the official file."""
    found = calculate_md5(path)
    if found != archive.md5:
        size = path.stat().st_size
        raise ACKDError(
            f"{path} is not the official file of {archive.name} ({size:,} of {archive.size:,} bytes, checksum {found} "
            f"instead of {archive.md5}): it is incomplete or damaged, so delete it and download it again"
        )


def extract(path: Path, target: Path) -> None:
    """Unpack a tar or zip archive as the folder ``target``, which appears only once it is complete.

    An archive that holds nothing but one folder becomes that folder.

    Raises:
        ACKDError: if the archive is damaged, or would write outside its folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-unpacking-", dir=target.parent))
    try:
        _unpack(path, staging)
        entries = [entry for entry in staging.iterdir() if not entry.name.startswith(("._", "__MACOSX"))]
        inner = entries[0] if len(entries) == 1 and entries[0].is_dir() else staging
        inner.replace(target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        reason = str(error) or type(error).__name__
        raise ACKDError(
            f"could not unpack {path} to {target} ({reason}): delete the archive to download it again, or make room"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    target.chmod(0o755)  # mkdtemp makes folders private


def _unpack(path: Path, staging: Path) -> None:
    if not zipfile.is_zipfile(path):
        with tarfile.open(path) as tar:
            tar.extractall(staging, filter="data")  # "data": no absolute paths, no "..", no links or devices outside
        return
    with zipfile.ZipFile(path) as archive:
        inside = staging.resolve()
        for name in archive.namelist():
            if not (inside / name).resolve().is_relative_to(inside):
                raise zipfile.BadZipFile(f"its member {name!r} would be written outside the folder")
        archive.extractall(staging)


class DownloadedDataModule(ImageDataModule):
    """A data set that can be downloaded.

    Args:
        root: folder that the archive is kept in, or that already holds the unpacked data set.
        batch_size: global training batch: each of W processes takes ``batch_size / W``.
        eval_batch_size: batch of each process in validation, test and prediction.
        val_fraction: share that is held out for validation; 0 holds nothing out.
        train_fraction: share of each class of the training part that is used, for small runs.
        max_per_class: at most so many training images of each class.
        num_workers: worker processes of each loader; results do not depend on it.
        seed: seed of shuffling and augmentation; by default the one of ``seed_everything``, or 0.
        download: fetch the archive when the data are not there.
        url: a mirror (http, https or file) of the official archive; its checksum has to be the same.
        cache: keep decoded images as a file next to the data.
    """

    archive: Archive

    def __init__(
        self,
        root: str | Path = ROOT,
        *,
        batch_size: int = BATCH_SIZE,
        eval_batch_size: int = EVAL_BATCH_SIZE,
        val_fraction: float = VAL_FRACTION,
        train_fraction: float = 1.0,
        max_per_class: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        download: bool = True,
        url: str | None = None,
        cache: bool = True,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            max_per_class=max_per_class,
            num_workers=num_workers,
            seed=seed,
            cache=cache,
        )
        self.download = download
        self.url = url

    def _archive_file(self) -> Path:
        """Return the verified archive, downloaded if it has to be and may be."""
        path = self.root / self.archive.filename
        if not self.download and not path.exists():
            raise ACKDError(
                f"{self.archive.name} is not in {self.root}: put {self.archive.filename} or the unpacked folder there, "
                "or set download: true"
            )
        return fetch(self.archive, self.root, url=self.url)
