"""Open a trained network in any format, a run or a checkpoint, and run it in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.formats.formats import BY_ENDING
from ackd_lightning.deploy.pixels import AnyImage, Preprocessing
from ackd_lightning.deploy.student import Predictions, predict
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.hub import is_hub_name
from ackd_lightning.models.weight_files import local_file
from ackd_lightning.runs.export import network_of
from ackd_lightning.runs.files import Which, find_checkpoint, read_checkpoint, refuse_which

ENDINGS = tuple(BY_ENDING)
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

    @property
    def image_dtype(self) -> torch.dtype:
        """Type of the images that ``run`` reads."""
        return torch.uint8 if self.description.reads == "uint8" else torch.float32

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
        parts = torch.split(pixels, self.description.batch or max(len(pixels), 1))  # what the file takes at once
        return torch.cat([self.run(each).float().cpu() for each in parts])

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
        path: ``.safetensors``, ``.onnx``, ``.pt2``, ``.pte`` or ``.xml`` (OpenVINO) file, checkpoint, run folder, or
            ``hf:USER/NAME[@revision]`` on the hub.
        which: Checkpoint of a run folder.
        device: Device for weights of safetensors and checkpoints; other formats run on the CPU.
        learner: Learner of a run: 0 for the student, from 1 for a peer.

    Raises:
        ACKDError: If there is no such file, its format is unknown, it was not written by this package, or a library
            that it needs is not installed; or if a file is named and ``which`` is another checkpoint.
    """
    file = local_file(path) if is_hub_name(path) else Path(path).expanduser()
    ending = file.suffix.lower()
    if file.is_dir() or ending == ".ckpt":
        checkpoint = find_checkpoint(file, which)
        network, metadata = network_of(read_checkpoint(checkpoint), checkpoint, learner=learner)
        description = Description.from_metadata(metadata, str(checkpoint))
        return of_module(checkpoint, description, network, "checkpoint", device)
    if not file.is_file():
        raise ACKDError(f"{file} does not exist; name a run folder, or a file that `ackd export` wrote")
    refuse_which(file, which)
    if ending not in BY_ENDING:
        raise ACKDError(
            f"{file} has a format that is unknown; name a run folder, or a file that ends in {', '.join(BY_ENDING)}"
        )
    kind = BY_ENDING[ending]
    opened = kind.open_file(file)
    if "model" not in opened.metadata:
        raise ACKDError(
            f"{file} has no description of ackd-lightning, so its classes and preprocessing are unknown; name a file "
            "that `ackd export` wrote"
        )
    description = Description.from_metadata(opened.metadata, str(file))
    if opened.network is not None:
        return of_module(file, description, opened.network, kind.name, device)
    return ExportedNetwork(file, description, opened.run, kind=kind.name)


def of_module(
    path: Path, description: Description, network: nn.Module, kind: str, device: str | torch.device
) -> ExportedNetwork:
    """Return a network in torch as one that was opened.

    Args:
        path: File that it is in.
        description: What it expects and is.
        network: Network in evaluation mode.
        kind: Format, or ``checkpoint``.
        device: Device that it is moved to.
    """
    moved = network.to(device)

    def run(images: Tensor) -> Tensor:
        return cast("Tensor", moved(images.to(device)))

    return ExportedNetwork(path, description, run, kind=kind, network=moved)
