"""Write a trained network in a format, check the file, and only then give it its name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.checking import LIMITS, Check, CheckImages, compare
from ackd_lightning.deploy.description import Accuracy, Description
from ackd_lightning.deploy.formats.formats import Format
from ackd_lightning.deploy.formats.program import telling_line
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import clone
from ackd_lightning.writing import whole_files


class WithPreprocessing(nn.Module):
    """Network that reads uint8 images: conversion and normalisation are part of it.

    Args:
        network: Network that reads normalised images.
        mean: Mean of each channel, of pixels in 0 to 1.
        std: Standard deviation of each channel.
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        scale = torch.tensor([1 / (255 * each) for each in std]).view(-1, 1, 1)
        offset = torch.tensor([first / second for first, second in zip(mean, std, strict=True)]).view(-1, 1, 1)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", offset)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``B x K`` of images ``B x C x H x W`` uint8."""
        return cast("Tensor", self.network(images.to(torch.float32) * self.scale - self.offset))


def reading_uint8(network: nn.Module, description: Description) -> nn.Module:
    """Return a network with conversion and normalisation in it; its description has ``reads="uint8"``.

    Args:
        network: Network that reads normalised images.
        description: What it is.

    Raises:
        ACKDError: If its images are not uint8 from 0 to 255, or mean and std are unknown.
    """
    prepared = Preprocessing(description)
    if prepared.form.deep:
        raise ACKDError(
            "--with-preprocessing needs images of 8 bits and this network was trained on images of more; leave it out"
        )
    if prepared.form.value_range is not None:
        low, high = prepared.form.value_range
        raise ACKDError(
            f"--with-preprocessing reads pixels from 0 to 255 and this network was trained with value_range {low:g} to "
            f"{high:g}; leave it out"
        )
    return WithPreprocessing(network, prepared.mean, prepared.std).eval()


def measured(description: Description, images: CheckImages, reference: Tensor) -> Description:
    """Add the accuracy on the images of the check, unless one of that part is known, and what the check is.

    Args:
        description: What the network is.
        images: Images of the check.
        reference: ``N x K`` logits of the trained network.
    """
    value = images.accuracy(reference)
    known = {each.part for each in description.accuracy}
    if value is None or images.part is None or images.part in known:
        return description
    return description.replace(accuracy=(*description.accuracy, Accuracy(images.part, value, images.counted)))


def export(
    network: nn.Module,
    description: Description,
    target: Path,
    kind: Format,
    *,
    images: CheckImages,
    reference: Tensor,
    overwrite: bool = False,
) -> Check:
    """Write a network, compare the file with it on images, and keep the file only if they agree.

    Args:
        network: Network in evaluation mode on the CPU.
        description: What it is; ``reads`` says which images it takes.
        target: File to write.
        kind: Format.
        images: Images of the check.
        reference: ``N x K`` logits of the trained network on them.
        overwrite: Whether to replace a file that exists.

    Returns:
        Result of the check.

    Raises:
        ACKDError: If the file exists, a library is missing, the format refuses the network, the disk is full, or the
            file gives other logits.
    """
    kind.check_libraries()
    check_free(kind, target, overwrite=overwrite)
    limits = LIMITS["int8" if description.quantization else description.dtype]
    model = "by the int8 network in torch" if description.quantization else "in training"
    words = f"{kind.name} file on {images.words}: at least {limits.agreement:.0%} of the classes as {model}"
    if limits.difference is not None:
        words += f", logits within {limits.difference:g} of the largest"
    stated = description.replace(checked=words)
    pixels = next(iter(images))[:1].repeat(2, 1, 1, 1)
    example = Preprocessing(description).raw(pixels) if description.reads == "uint8" else pixels
    size = sum(each.numel() * each.element_size() for each in network.state_dict().values())
    _require_space(target, size)

    def written(partial: Path, stated: Description) -> Check:
        try:
            kind.write(clone(network), example, partial, stated.metadata())
        except RuntimeError as error:  # of libraries that do not raise OSError
            _require_space(target, size)
            raise ACKDError(f"{target} cannot be written ({telling_line(error)}); choose another format") from error
        opened = kind.open_file(partial)

        def run(pixels: Tensor) -> Tensor:
            try:
                return opened.run(Preprocessing(stated).raw(pixels) if stated.reads == "uint8" else pixels)
            except RuntimeError as error:  # of a graph that its exporter took and its runtime cannot run
                raise ACKDError(
                    f"{target} was not written, because its runtime cannot run it ({telling_line(error)}); choose "
                    "another format"
                ) from error

        run(pixels[:1])  # some graphs take several images and not one
        check = compare(images, reference, run, single=opened.metadata.get("batch") == "1")
        if (problem := check.problem(limits, images)) is not None:
            raise ACKDError(f"{target} was not written, because {problem}; choose another format or --which")
        return check

    try:
        with whole_files(target) as partial:
            check = written(partial, stated)
            if (own := _own_accuracy(stated, images, check)) != stated:
                check = written(partial, own)
    except OSError as error:
        raise ACKDError(
            f"{target} cannot be written ({error.strerror or telling_line(error)}); choose a folder with room that you "
            "may write in"
        ) from error
    return check


def _own_accuracy(stated: Description, images: CheckImages, check: Check) -> Description:
    """Description of an int8 file with the accuracy of the file itself: kernels round each layer in their own way."""
    if stated.quantization is None or check.after is None or images.part is None:
        return stated
    return stated.replace(accuracy=(Accuracy(images.part, check.after, images.counted),))


def check_free(kind: Format, target: Path, *, overwrite: bool) -> None:
    """Refuse to replace files.

    Args:
        kind: Format.
        target: File to write.
        overwrite: Whether files may be replaced.

    Raises:
        ACKDError: Naming the file that exists.
    """
    existing = next((each for each in kind.files(target) if each.exists()), None)
    if existing is not None and not overwrite:
        raise ACKDError(f"{existing} exists; choose another --out or pass --overwrite")


def _require_space(target: Path, size: int) -> None:
    """Refuse a disk without room for a file."""
    folder = next(each for each in target.absolute().parents if each.is_dir())
    free, needed = shutil.disk_usage(folder).free, 2 * size + 2**20
    if free < needed:
        raise ACKDError(
            f"{target} needs up to {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB free; choose a folder "
            "with room"
        )
