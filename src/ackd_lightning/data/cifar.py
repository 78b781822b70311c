"""CIFAR-100 from its official archive.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009;
https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ackd_lightning.data.cache import cached, fingerprint
from ackd_lightning.data.download import Archive, DownloadedDataModule
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Pixels
from ackd_lightning.errors import ACKDError

_MEMBERS = ("train", "test", "meta")


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r} does not occur in CIFAR files")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler for the official files: containers, strings, numbers and NumPy arrays, and nothing that runs code."""

    # `_reconstruct` makes an empty array; it moved between NumPy 1 and 2, so it is taken from an array.
    _allowed: dict[tuple[str, str], Any] = {  # noqa: RUF012 (read only)
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR file") from None


def read_arrays(content: bytes) -> dict[str, Any]:
    """Read one official CIFAR pickle without allowing it to run code.

    Args:
        content: Bytes of the file.

    Raises:
        ACKDError: If the file names anything but arrays and plain containers, or is cut off.
    """
    try:
        return dict(_ArrayUnpickler(io.BytesIO(content), encoding="latin1").load())
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ACKDError(f"the CIFAR file cannot be read safely ({error}): download the official archive") from None


class CIFAR100DataModule(DownloadedDataModule):
    """CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 in 100 (fine) classes.

    Reads the official ``cifar-100-python.tar.gz``, or the folder ``cifar-100-python`` that it unpacks to, in ``root``.
    Arguments are those of `DownloadedDataModule` and of [`ImageDataModule`][ackd_lightning.data.ImageDataModule].
    """

    num_classes = 100
    published_train_images = 50_000
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)
    input_size = 32
    archive = Archive(
        name="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        filename="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        size=169_001_437,
    )
    folder = "cifar-100-python"
    member_md5 = {  # noqa: RUF012 (read only)
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    }

    def _unpacked(self) -> dict[str, Path] | None:
        for place in (self.root / self.folder, self.root):
            found = {name: place / name for name in _MEMBERS}
            if all(path.is_file() for path in found.values()):
                return found
        return None

    def _fetch(self) -> None:
        if self._unpacked() is None and not (self.root / self.archive.filename).exists():
            self._archive_file()

    def _load(self, part: Part) -> Pixels:
        unpacked = self._unpacked()
        archive = self.root / self.archive.filename
        files = tuple(unpacked.values()) if unpacked else (archive,)
        if not unpacked and not archive.exists():
            self._archive_file()
        mark = fingerprint(PathTable.of_paths(self.root, files), self.root, "cifar100")
        return cached(self._cache_file(self.root, f"cifar100-{part}"), mark, lambda: self._decode(part))

    def _read(self, name: str) -> dict[str, Any]:
        unpacked = self._unpacked()
        if unpacked:
            content = unpacked[name].read_bytes()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != self.member_md5[name]:
                raise ACKDError(
                    f"{unpacked[name]} is not the official file ({len(content):,} bytes, wrong checksum): "
                    f"unpack {self.archive.filename} again"
                )
            return read_arrays(content)
        path = self._archive_file()
        try:
            with tarfile.open(path) as tar:
                member = tar.extractfile(f"{self.folder}/{name}")
                if member is None:
                    raise KeyError(name)
                return read_arrays(member.read())
        except (tarfile.TarError, EOFError, OSError, KeyError) as error:
            raise ACKDError(f"could not read {name} in {path} ({error}): delete the archive and run again") from None

    def _decode(self, part: Part) -> Pixels:
        content = self._read(part)
        names = tuple(self._read("meta")["fine_label_names"])
        images = torch.from_numpy(np.array(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        return Pixels(names, images, torch.tensor(content["fine_labels"], dtype=torch.int64))
