"""Int8 networks of a run: as they were fine-tuned, or calibrated on training images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.transforms import normalise
from ackd_lightning.data.webdataset import WebDatasetDataModule
from ackd_lightning.deploy.checking import CheckImages
from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.exporting import export, reading_uint8
from ackd_lightning.deploy.files import open_network
from ackd_lightning.deploy.formats.formats import Format
from ackd_lightning.deploy.latency import Latency, measure
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import clone, load_tensors, unwrapped
from ackd_lightning.models.quantization import FakeQuantized, Quantized, quantize
from ackd_lightning.models.student_config import Backend
from ackd_lightning.models.weights import STUDENT_PREFIX
from ackd_lightning.types import Batch

BACKENDS: dict[str, Backend] = {"onnx": "x86", "pt2": "x86", "pte": "xnnpack"}
"""Kernels that a format is quantised for, by its name."""
NOTEWORTHY_LOSS = 0.01
"""Loss of accuracy above which it is said."""
NOTEWORTHY_IMAGES = 3
"""Smallest number of images lost that is reported."""


def fine_tuned(content: Mapping[str, Any], origin: Path, network: Any) -> FakeQuantized | None:
    """Return the student of a checkpoint as it was fine-tuned for int8; None if it was not.

    Args:
        content: Content of a checkpoint of this package.
        origin: The checkpoint, for messages.
        network: The student in float32.

    Raises:
        ACKDError: If the checkpoint is damaged.
    """
    metadata = content["ackd_lightning"]
    backend: Backend | None = metadata.get("quantization")
    if backend is None:
        return None
    stated = metadata["input_size"]
    size = stated if isinstance(stated, int) else (stated[0], stated[1])
    student = FakeQuantized(clone(unwrapped(network)), backend, size, channels=metadata.get("channels")).eval()
    state = content["state_dict"].items()
    try:
        load_tensors(
            student, {key[len(STUDENT_PREFIX) :]: each for key, each in state if key.startswith(STUDENT_PREFIX)}
        )
    except RuntimeError as error:
        raise ACKDError(
            f"{origin} is damaged (its ranges for int8 do not fit the network); choose another one"
        ) from error
    return student


def int8_network(
    network: Any, student: FakeQuantized | None, kind: str, data: Any, *, count: int
) -> tuple[Quantized, str]:
    """Return the int8 network for a format, and how it was made, in words.

    Args:
        network: The student in float32.
        student: The student as it was fine-tuned for int8; None to calibrate.
        kind: Name of the format.
        data: Data module of the run after ``setup``; None when it is not there.
        count: Number of training images to calibrate on.

    Raises:
        ACKDError: If the format has no int8, or the student was fine-tuned for other kernels, or there are no images.
    """
    if kind not in BACKENDS:
        raise ACKDError(f"--int8 is given and format {kind} has no int8; choose from {', '.join(BACKENDS)}")
    backend = BACKENDS[kind]
    if student is not None:
        if kind == "pte" and student.backend != backend:
            raise ACKDError(
                f"the student was fine-tuned for {student.backend} and pte runs on {backend}; choose onnx or pt2, or "
                f"fine-tune it with --model.student.quantization {backend}"
            )
        return student.converted(), f"int8 for {student.backend}, fine-tuned"
    if data is None:
        raise ACKDError(
            "--int8 calibrates on training images and --check random reads none; leave --check random out, or "
            "fine-tune the student with --config qat.yaml"
        )
    batches, words = _training_images(data, count)
    images = list(batches)
    if not images:
        raise ACKDError("the data have no training images to calibrate on; give --data.root, or leave --int8 out")
    found = sum(map(len, images))
    return quantize(network, images, backend=backend), f"int8 for {backend}, calibrated on {found} {words}"


def _training_images(data: Any, count: int) -> tuple[Iterator[Tensor], str]:
    """Return training images as they are prepared in evaluation, spread evenly where their order is known."""
    if isinstance(data, ImageDataModule) and not isinstance(data, WebDatasetDataModule):
        loader = data.loader_in_order("train", most=count)
        return (normalise(each.image, data.mean, data.std) for each in loader), "training images"

    def batches() -> Iterator[Tensor]:
        seen = 0
        for raw in data.train_dataloader():
            batch = data.on_after_batch_transfer(raw, 0)
            image = (batch.image if isinstance(batch, Batch) else batch[0])[: count - seen]
            seen += len(image)
            yield image
            if seen >= count:
                return

    return batches(), "training images, augmented as in training"


@dataclass(frozen=True)
class Measured:
    """A file beside others.

    Attributes:
        name: Name of the row.
        size: Size in bytes.
        agreement: Share of images with the same most probable class as the float32 student.
        accuracy: Accuracy on the images of the check; None without classes.
        latency: Time of one image.
        single: Whether the file takes one image at a time alone.
    """

    name: str
    size: int
    agreement: float
    accuracy: float | None
    latency: Latency
    single: bool


def measured_file(name: str, path: Path, images: CheckImages, reference: Tensor) -> Measured:
    """Measure a file.

    Args:
        name: Name of the row.
        path: File.
        images: Images of the check.
        reference: ``N x K`` logits of the float32 student on them.
    """
    opened = open_network(path)
    found = images.logits(opened.logits)
    agreement = float((found.argmax(1) == reference.argmax(1)).float().mean())
    latency = measure(opened.run, opened.description.image_shape, dtype=opened.image_dtype)
    single = opened.description.batch == 1
    return Measured(name, path.stat().st_size, agreement, images.accuracy(found), latency, single)


def export_int8(
    network: nn.Module,
    quantised: Quantized,
    words: str,
    description: Description,
    target: Path,
    kind: Format,
    *,
    images: CheckImages,
    reference: Tensor,
    advice: str,
    overwrite: bool = False,
) -> tuple[Measured, Measured]:
    """Write an int8 network as `export` does, and measure the file beside one with the float32 student.

    Args:
        network: The student in float32.
        quantised: Its int8 network.
        words: How that was made.
        description: What the student is; ``reads`` says which images both files take.
        target: File to write.
        kind: Format.
        images: Images of the check.
        reference: ``N x K`` logits of the student on them.
        advice: What to do about an int8 network that guesses.
        overwrite: Whether to replace a file that exists.

    Returns:
        The file of the float32 student, which is not kept, and the int8 file.

    Raises:
        ACKDError: As `export`; and if the int8 network only guesses while the student does not.
    """
    logits = images.logits(quantised)
    accuracy, before = images.accuracy(logits), images.accuracy(reference)
    if accuracy is not None and images.may_be_chance(logits) and not images.may_be_chance(reference):
        raise ACKDError(
            f"{target} was not written, because the int8 network is right for {accuracy:.2%} of "
            f"{images.counted_words}, as guessing is, and the student for {before:.2%}; {advice}"
        )
    own = description.replace(quantization=words, accuracy=())  # `export` measures the file's own
    prepared = [quantised, network]
    if description.reads == "uint8":
        prepared = [reading_uint8(each, description.replace(reads="normalised")) for each in prepared]
    export(prepared[0], own, target, kind, images=images, reference=logits, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="ackd-") as folder:
        plain = Path(folder) / target.name
        export(prepared[1], description, plain, kind, images=images, reference=reference)
        first = measured_file(f"{kind.name}, float32", plain, images, reference)
    return first, measured_file(f"{kind.name}, {words}", target, images, reference)
