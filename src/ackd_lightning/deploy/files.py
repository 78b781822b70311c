"""Open a trained network in any format, a run or a checkpoint, and run it in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.formats import onnx, openvino, pt2, pte
from ackd_lightning.deploy.formats.program import Opened, Opener, foreign
from ackd_lightning.deploy.pixels import AnyImage, Preprocessing
from ackd_lightning.deploy.student import Predictions, build, predict
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weights import read_metadata
from ackd_lightning.runs.export import network_of
from ackd_lightning.runs.files import Which, find_checkpoint, read_checkpoint

_OPENERS: dict[str, Opener] = {
    ".onnx": onnx.open_file,
    ".pt2": pt2.open_file,
    ".pte": pte.open_file,
    ".xml": openvino.open_file,
}
ENDINGS = (".safetensors", *_OPENERS)
"""Endings of files that can be opened."""


class ExportedNetwork:
    """A trained network that was opened.

    Args:
        path: File, or checkpoint of a run.
        description: What the network is.
        run: Function from images, as the file reads them, to ``B x K`` logits.
        kind: Format: safetensors, onnx, pt2, pte, openvino or checkpoint.
        network: The network as a module; None for a format that holds a graph.

    Attributes:
        path: File, or checkpoint of a run.
        description: What the network is.
        kind: Format.
        network: The network as a module, or None.
        run: Function from images, as the file reads them, to logits.
    """

    def __init__(
        self,
        path: Path,
        description: Description,
        run: Callable[[Tensor], Tensor],
        *,
        kind: str,
        network: nn.Module | None = None,
    ) -> None:
        self.path, self.description, self.run = path, description, run
        self.kind, self.network = kind, network

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Compute logits on the device of the network.

        Args:
            pixels: ``B x C x H x W`` float32, normalised. A file with preprocessing gets them as uint8 again.

        Returns:
            ``B x K`` float32 on the CPU.
        """
        if self.description.reads == "uint8":
            pixels = Preprocessing(self.description).raw(pixels)
        return self.run(pixels).float().cpu()

    def predict(self, images: AnyImage | Sequence[AnyImage] | Tensor, *, batch_size: int = 32) -> Predictions:
        """Predict the classes of images.

        Args:
            images: One image or several: files, PIL images, or tensors of pixels; also ``B x C x H x W``.
            batch_size: Number of images in one call.
        """
        return predict(self.logits, self.description, images, batch_size=batch_size)


def open_network(
    path: str | Path, *, which: Which = "last", device: str | torch.device = "cpu", learner: int = 0
) -> ExportedNetwork:
    """Open an exported file, or the student of a run.

    Args:
        path: ``.safetensors``, ``.onnx``, ``.pt2``, ``.pte`` or ``.xml`` (OpenVINO) file, checkpoint, or run folder.
        which: Checkpoint of a run folder.
        device: Device for weights of safetensors and checkpoints; other formats run on the CPU.
        learner: Learner of a run: 0 for the student, from 1 for a peer.

    Raises:
        ACKDError: If there is no such file, its format is unknown, it was not written by this package, or a library
            that it needs is not installed.
    """
    file = Path(path).expanduser()
    ending = file.suffix.lower()
    if file.is_dir() or ending == ".ckpt":
        checkpoint = find_checkpoint(file, which)
        network, metadata = network_of(read_checkpoint(checkpoint), checkpoint, learner=learner)
        return _module(checkpoint, Description.from_metadata(metadata, str(checkpoint)), network, "checkpoint", device)
    if not file.is_file():
        raise ACKDError(f"{file} does not exist; name a run folder, or a file that `ackd export` wrote")
    if ending == ".safetensors":
        description = Description.from_metadata(read_metadata(file), str(file))
        return _module(file, description, build(description, file), "safetensors", device)
    if ending not in _OPENERS:
        raise ACKDError(f"{file} has a format that is unknown; name a run folder, or a file in {', '.join(ENDINGS)}")
    opened = _OPENERS[ending](file)
    return _described(file, opened, "openvino" if ending == ".xml" else ending[1:])


def _described(file: Path, opened: Opened, kind: str) -> ExportedNetwork:
    if "model" not in opened.metadata:
        raise foreign(file, "description")
    return ExportedNetwork(file, Description.from_metadata(opened.metadata, str(file)), opened.run, kind=kind)


def _module(
    path: Path, description: Description, network: nn.Module, kind: str, device: str | torch.device
) -> ExportedNetwork:
    moved = network.to(device)

    def run(images: Tensor) -> Tensor:
        return cast("Tensor", moved(images.to(device)))

    return ExportedNetwork(path, description, run, kind=kind, network=moved)
