"""What a run answered for every test image: a small file from which two runs are compared image by image.

``RUN/predictions/test-last.safetensors`` and ``test-best.safetensors`` hold, in the order of the test set, the tensors
``target`` and ``prediction`` (int32) and ``probability`` (float32, of the predicted class): 12 bytes for each image.
Their metadata name the data and the classes, and hold a hash of the images' names and classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.writing import whole_file

FOLDER = "predictions"
"""Folder of these files in that of a run."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Predictions of one network for N test images.

    Attributes:
        target: ``N`` class indices.
        prediction: ``N`` predicted class indices.
        probability: ``N`` float32, the probability of the predicted class.
        images: Hash of the images' names and classes; equal for two networks that saw the same images.
        data: Name of the data module.
    """

    target: Tensor
    prediction: Tensor
    probability: Tensor
    images: str
    data: str

    @property
    def right(self) -> Tensor:
        """``N`` bool, whether the prediction is the target."""
        return self.prediction == self.target

    def __len__(self) -> int:
        return len(self.target)


def answers_file(run: Path, which: str) -> Path:
    """Return where the answers of a checkpoint are.

    Args:
        run: Folder of the run.
        which: Stem of the checkpoint, such as ``last``.
    """
    return run / FOLDER / f"test-{which}.safetensors"


def hash_of_images(target: Tensor, classes: Sequence[str] | None, names: Sequence[str] | None) -> str:
    """Return a hash of the names and classes of images, which does not depend on how the classes are numbered.

    Args:
        target: ``N`` class indices.
        classes: Names of the classes; None when unknown.
        names: File name of each image; None where they are not files.
    """
    labels = [classes[each] if classes and each >= 0 else str(each) for each in target.tolist()]
    lines = labels if names is None else [f"{name}\t{label}" for name, label in zip(names, labels, strict=True)]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def write_answers(answers: Answers, path: Path) -> None:
    """Write the answers whole or not at all.

    Args:
        answers: Predictions.
        path: File to write.
    """
    tensors = {
        "target": answers.target.to(torch.int32),
        "prediction": answers.prediction.to(torch.int32),
        "probability": answers.probability.to(torch.float32),
    }
    with whole_file(path) as partial:
        metadata = {"images": answers.images, "data": answers.data}
        save_file({key: each.cpu().contiguous() for key, each in tensors.items()}, partial, metadata=metadata)


def read_answers(path: Path) -> Answers:
    """Read what `write_answers` wrote.

    Args:
        path: File.

    Raises:
        ACKDError: If it is damaged or another kind of file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            target, prediction, probability = (file.get_tensor(key) for key in ("target", "prediction", "probability"))
        if not target.shape == prediction.shape == probability.shape or target.dim() != 1:
            raise ValueError(f"its tensors have the shapes {json.dumps([target.shape, prediction.shape])}")
        return Answers(target.long(), prediction.long(), probability, metadata["images"], metadata["data"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise ACKDError(f"{path} cannot be read ({reason}); delete it and run `ackd test` again") from error
