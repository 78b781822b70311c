"""The values of a first configuration, chosen from the photos, each with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ackd_lightning.commands.init.survey import Survey
from ackd_lightning.data.sampling import held_out_of
from ackd_lightning.errors import count_of
from ackd_lightning.runs.versions import processors

_LITE, _LCNET = "timm:tf_efficientnet_lite0", "timm:lcnet_050"
_SIZES = (96, 128, 160, 192, 224)
_SMALL_PHOTOS = 48
"""Median shorter side below which the networks for 32 x 32 pixels are taken."""
_LARGEST = {"cuda": 224, "cpu": 128}
_LARGEST_BATCH = {"cuda": 128, "cpu": 64}
_STEPS = {"cuda": 20_000, "cpu": 6_000}
"""Steps of a training from scratch."""
_FINE_TUNING_STEPS = 2_000
_UNEQUAL = 3.0
"""Ratio of the largest class to the smallest one from which all classes are read equally often."""
_FEW = 30
"""Training images of a class below which a fifth instead of a tenth is held out."""


class Choice(NamedTuple):
    """A value with its reason.

    Attributes:
        setting: What it is for.
        value: The value as text.
        reason: Why it was chosen.
    """

    setting: str
    value: str
    reason: str


@dataclass(frozen=True)
class Choices:
    """Values of both configurations.

    Attributes:
        device: ``cuda`` or ``cpu``.
        image_size: Side of the images in pixels.
        channels: Number of channels.
        value_range: Values that become 0 and 1; None for those of the files' type.
        val_fraction: Share of the training images that is held out; None if there is a validation folder.
        trained: Number of training images after that.
        batch_size: Images of a batch.
        num_workers: Processes that read images.
        unequal: Largest class by the smallest one.
        pretrained: Whether the teacher starts from published weights.
        teacher: Network of the teacher.
        student: Network of the student.
        method: Name of the method's fragment.
        teacher_epochs: Epochs of the teacher.
        student_epochs: Epochs of the student.
    """

    device: str
    image_size: int
    channels: int
    value_range: tuple[int, int] | None
    val_fraction: float | None
    trained: int
    batch_size: int
    num_workers: int
    unequal: float
    pretrained: bool
    teacher: str
    student: str
    method: str
    teacher_epochs: int
    student_epochs: int

    @property
    def small(self) -> bool:
        """Whether the networks are those for 32 x 32 pixels, trained by SGD."""
        return self.image_size == 32

    @property
    def balanced(self) -> bool:
        """Whether all classes are read equally often."""
        return self.unequal >= _UNEQUAL

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(self.trained / self.batch_size)


def choose(seen: Survey, *, pretrained: bool, device: str | None = None) -> Choices:
    """Choose the values of both configurations.

    Args:
        seen: What the folder holds.
        pretrained: Whether published weights may be used.
        device: ``cuda`` or ``cpu``; None for what there is.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    median, counts = seen.sides[1], seen.counts
    small = median < _SMALL_PHOTOS
    size = 32 if small else max([each for each in _SIZES if each <= min(median, _LARGEST[device])], default=_SIZES[0])
    pretrained = pretrained and not small
    val_fraction = None if "val" in seen.parts else 0.2 if min(counts) < _FEW else 0.1
    trained = sum(each - held_out_of(each, val_fraction or 0) for each in counts)
    if val_fraction is not None and trained == sum(counts):
        val_fraction = 0.0  # which validates on the test images
    batch = next((each for each in (128, 64, 32, 16) if each <= min(trained // 10, _LARGEST_BATCH[device])), 8)
    steps = math.ceil(trained / batch)
    from_scratch = max(20, min(200, _STEPS[device] // steps))
    return Choices(
        device=device,
        image_size=size,
        channels=1 if all(each.grey for each in seen.good) and not pretrained else 3,
        value_range=seen.value_range,
        val_fraction=val_fraction,
        trained=trained,
        batch_size=batch,
        num_workers=0 if small else min(8, processors()),
        unequal=max(counts) / min(counts),
        pretrained=pretrained,
        teacher="resnet56" if small else _LITE if pretrained else "resnet18",
        student="resnet20" if small else _LCNET,
        method="reviewkd" if pretrained else "kd",
        teacher_epochs=max(5, min(30, _FINE_TUNING_STEPS // steps)) if pretrained else from_scratch,
        student_epochs=from_scratch,
    )


def reasons(seen: Survey, chosen: Choices, *, asked: bool) -> list[Choice]:
    """Return every value with its reason.

    Args:
        seen: What the folder holds.
        chosen: The values.
        asked: Whether published weights were allowed.
    """
    c, median, counts = chosen, seen.sides[1], seen.counts
    on = "a GPU" if c.device == "cuda" else "a CPU"
    fits = f"the median shorter side is {median} pixels"
    if c.small:
        size_why = f"{fits}: networks for 32 x 32"
    elif median < _SIZES[0]:
        size_why = f"{fits}, enlarged for networks of photos"
    else:
        size_why = f"{fits}; at most {_LARGEST[c.device]} on {on}"
    if c.val_fraction is None:
        held_out, held_why = "val", "the folder has its own"
    elif c.val_fraction == 0:
        held_out, held_why = "the test images", "too few training images to hold any out"
    else:
        held_out = f"{c.val_fraction:.0%} of the training images"
        held_why = f"the smallest class has {count_of(min(counts), 'image')}"
    without = "--no-pretrained" if not asked else "published weights are for larger images"
    teacher_why = "starts from weights that timm publishes for ImageNet" if c.pretrained else f"from scratch: {without}"
    student_why = "the same kind, a third as deep" if c.small else "small, and made for CPUs (LCNet)"
    method_why = (
        "a student from scratch learned most from a fine-tuned teacher's features in docs/results.md"
        if c.method == "reviewkd"
        else "above plain training in docs/results.md, most of all with equal weights"
    )
    rows = [
        ("image size", f"{c.image_size} x {c.image_size}", size_why),
        ("validation", held_out, held_why),
        (
            "batch size",
            c.batch_size,
            f"{c.trained:,} images, {count_of(c.steps, 'step')} an epoch; the largest of 8 to "
            f"{_LARGEST_BATCH[c.device]} (on {on}) that gives 10 steps, or else 8",
        ),
        (
            "sampling",
            "balanced" if c.balanced else "shuffle",
            f"the largest class has {c.unequal:.1f} times the images of the smallest; balanced from {_UNEQUAL:.0f} on",
        ),
        ("teacher", c.teacher, teacher_why),
        ("student", c.student, student_why),
        ("method", c.method, method_why),
        (
            "teacher's recipe",
            *(("recipes/finetune", "small steps for published weights") if c.pretrained else _recipe(c)),
        ),
        ("teacher's epochs", c.teacher_epochs, f"{c.teacher_epochs * c.steps:,} steps of {c.batch_size} images"),
        ("student's recipe", *_recipe(c)),
        ("student's epochs", c.student_epochs, f"{c.student_epochs * c.steps:,} steps from scratch on {on}"),
    ]
    if c.num_workers:
        rows.insert(3, ("workers", c.num_workers, "processes that decode images; one for each processor"))
    if c.channels == 1:
        rows.insert(1, ("channels", 1, "all images are grey"))
    if c.value_range is not None:
        rows.insert(1, ("value range", list(c.value_range), "values of the 16-bit files"))
    return [Choice(setting, str(value), why) for setting, value, why in rows]


def _recipe(chosen: Choices) -> tuple[str, str]:
    if chosen.small:
        return "recipes/sgd", "the paper's, with the learning rate of small batches"
    return "recipes/adamw", "from scratch on photos; learning rate of docs/results.md"
