"""Public `load_student`: the network of an exported file with its weights, its classes and its preprocessing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.pixels import AnyImage, Preprocessing
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import load_tensors
from ackd_lightning.models.heads import with_head
from ackd_lightning.models.weights import fitting_tensors, read_metadata
from ackd_lightning.models.zoo import create_model


class Predictions(NamedTuple):
    """What a network says about images.

    Attributes:
        class_names: B names of the most probable class.
        probabilities: ``B x K`` float32, in the order of ``Description.names``.
    """

    class_names: list[str]
    probabilities: Tensor


if TYPE_CHECKING:

    class Student(nn.Module):
        """Network of a file; at run time it is the plain network with these attributes."""

        description: Description
        class_names: tuple[str, ...] | None

        def predict(self, images: AnyImage | Sequence[AnyImage] | Tensor, *, batch_size: int = 32) -> Predictions:
            """Predict the classes of images."""


def load_student(path: str | Path) -> Student:
    """Build the network that a file of ``ackd export`` or of a run describes, with its weights, in evaluation mode.

    The network maps normalised images to logits. It has three more attributes: ``description``, ``class_names`` (a
    tuple of text in the order of the logits, or None) and ``predict(images, batch_size=32)``, which takes files, PIL
    images or tensors of pixels, prepares them as evaluation in training did, and returns `Predictions`.

    Args:
        path: ``.safetensors`` file that names its model.

    Raises:
        ACKDError: If the file does not state which network it has, or does not have it.
    """
    description = Description.from_metadata(read_metadata(path), str(path))
    network = cast("Any", build(description, path))
    network.description, network.class_names = description, description.class_names
    network.predict = functools.partial(_predict_with, network)
    return cast("Student", network)


def build(description: Description, path: str | Path) -> nn.Module:
    """Build the network of a description with the weights of a file, in evaluation mode.

    Args:
        description: Metadata of the file.
        path: ``.safetensors`` file.

    Raises:
        ACKDError: If the file does not have the weights of that network.
    """

    def fresh() -> nn.Module:
        return with_head(create_model(description.model, description.num_classes, **description.options), head)

    head = description.head
    try:
        with torch.device("meta"):  # before anything of the stated size is allocated
            ghost = fresh()
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, ACKDError):
            raise
        raise ACKDError(
            f"{path} does not state which network it has; build it with create_model and use load_weights"
        ) from error
    tensors, _ = fitting_tensors(ghost, path, name=description.model)
    network = fresh()
    load_tensors(network, tensors)
    return network.eval()


def _predict_with(network: nn.Module, images: Any, *, batch_size: int = 32) -> Predictions:
    first = next(network.parameters())

    def logits(pixels: Tensor) -> Tensor:
        return cast("Tensor", network(pixels.to(first.device, first.dtype)))

    return predict(logits, cast("Any", network).description, images, batch_size=batch_size)


@torch.no_grad()
def predict(
    logits: Callable[[Tensor], Tensor],
    description: Description,
    images: AnyImage | Sequence[AnyImage] | Tensor,
    *,
    batch_size: int = 32,
) -> Predictions:
    """Predict the classes of images.

    Args:
        logits: Function from normalised images to logits.
        description: What the network expects.
        images: One image or several: files, PIL images, or tensors; also ``B x C x H x W``.
        batch_size: Number of images in one call.

    Raises:
        ACKDError: If there are no images, or one of them cannot be read.
    """
    each: list[AnyImage]
    if (isinstance(images, Tensor) and images.ndim == 4) or isinstance(images, list | tuple):
        each = list(images)
    else:
        each = [cast("AnyImage", images)]
    if not each:
        raise ACKDError("predict was given no images; give at least one")
    preprocessing = Preprocessing(description)
    parts = [
        logits(preprocessing.batch(each[start : start + batch_size])).float().softmax(dim=1).cpu()
        for start in range(0, len(each), batch_size)
    ]
    probabilities = torch.cat(parts)
    names = description.names
    return Predictions([names[number] for number in probabilities.argmax(dim=1).tolist()], probabilities)
