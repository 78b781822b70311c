"""The formats by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.version import Version

from ackd_lightning.deploy.formats import onnx, openvino, pt2, pte, safetensors
from ackd_lightning.deploy.formats.program import Opener, Writer
from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.extras import require


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        name: Name on the command line.
        ending: Ending of the file.
        write: Function that writes a network.
        open_file: Function that opens a file.
        extra: Extra of this package that the format needs; None for none.
        libraries: Libraries of the extra.
        beside: Ending of a second file beside it; None for none.
        oldest_torch: Oldest torch that writes files which `open_file` reads; None for any.
    """

    name: str
    ending: str
    write: Writer
    open_file: Opener
    extra: str | None = None
    libraries: tuple[str, ...] = ()
    beside: str | None = None
    oldest_torch: str | None = None

    def files(self, path: Path) -> list[Path]:
        """Return a file and what belongs beside it.

        Args:
            path: File of this format.
        """
        return [path] if self.beside is None else [path, path.with_suffix(self.beside)]

    def check_libraries(self) -> None:
        """Import what the format needs.

        Raises:
            ACKDError: If a library is not installed, or torch is too old.
        """
        for library in self.libraries:
            require(library, str(self.extra), f"format {self.name}")
        if self.oldest_torch is not None and Version(Version(torch.__version__).base_version) < Version(
            self.oldest_torch
        ):
            raise ACKDError(
                f"format {self.name} needs torch {self.oldest_torch} or newer and this is {torch.__version__}; update "
                "torch, or choose another format"
            )


FORMATS = {
    each.name: each
    for each in (
        Format("safetensors", ".safetensors", safetensors.write, safetensors.open_file),
        Format("onnx", ".onnx", onnx.write, onnx.open_file, "onnx", ("onnx", "onnxscript", "onnxruntime")),
        Format("pt2", ".pt2", pt2.write, pt2.open_file, oldest_torch="2.9"),
        Format("pte", ".pte", pte.write, pte.open_file, "executorch", ("executorch",)),
        Format("openvino", ".xml", openvino.write, openvino.open_file, "openvino", ("openvino",), beside=".bin"),
    )
}
BY_ENDING = {each.ending: each for each in FORMATS.values()}


def find_format(name: str) -> Format:
    """Return a format.

    Args:
        name: Name of the format, or ending of its files.

    Raises:
        ACKDError: If there is no such format.
    """
    found = FORMATS.get(name) or BY_ENDING.get(name.lower())
    if found is None:
        raise ACKDError(f"format {name!r} is unknown; {near_matches(name, FORMATS)}")
    return found


def file_size(path: Path) -> int:
    """Return the size of a network's file in bytes, with what belongs beside it.

    Args:
        path: File of any format, or a checkpoint.
    """
    kind = BY_ENDING.get(path.suffix.lower())
    return sum(each.stat().st_size for each in (kind.files(path) if kind else [path]) if each.is_file())
