"""What a trained network is: architecture, classes, preprocessing, accuracy and origin, as text inside its file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.metadata import as_text, typed_metadata
from ackd_lightning.types import ImageSize, height_width

ORIGIN = (
    "method",
    "learner",
    "teacher",
    "data",
    "seed",
    "epochs",
    "weights",
    "started_from",
    "frozen",
    "trained_for_int8",
    "date",
)
"""Entries about the training of a network, in the order in which they are printed."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on one part of the data.

    Attributes:
        part: ``val`` or ``test``.
        value: Share of images with the right class, from 0 to 1.
        count: Number of images; None when unknown.
    """

    part: str
    value: float
    count: int | None = None


@dataclass(frozen=True)
class Description:
    """What a file of a trained network states.

    Attributes:
        model: Name for `create_model`.
        num_classes: Number K of classes.
        input_size: Side of square images in pixels, or their height and width.
        options: Options for `create_model`.
        head: Head of a method that replaces the classifier; None without one.
        class_names: Names of the classes in the order of the logits; None when unknown.
        channels: Number of channels of the images.
        mean: Mean of each channel that images are normalised with, of pixels in 0 to 1; None when unknown.
        std: Standard deviation of each channel, as ``mean``.
        interpolation: How images are resized.
        crop_pct: Side of the centre crop, relative to that of the resized image; None when unknown, which is read as 1.
        value_range: Pixel values that become 0 and 1; None for the range of the file's type.
        background: Colour that shows through transparent pixels.
        pixels: Type of images before normalisation: ``float32`` for files of more than 8 bits.
        accuracy: Accuracies that were measured.
        origin: Text about the training by the names of `ORIGIN`, as far as it is known.
        versions: Versions of the libraries by name.
        checked: How the file was checked; None when it was not.
        quantization: How weights and activations are stored as integers; None for floats.
        dtype: Type of the weights.
        reads: Images that the network reads: ``normalised`` float32, or ``uint8`` for a file with preprocessing.
        batch: Largest number of images in one call; None for any.
    """

    model: str
    num_classes: int
    input_size: ImageSize
    options: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = "bilinear"
    crop_pct: float | None = None
    value_range: tuple[float, float] | None = None
    background: str = "white"
    pixels: Literal["uint8", "float32"] = "uint8"
    accuracy: tuple[Accuracy, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    checked: str | None = None
    quantization: str | None = None
    dtype: str = "float32"
    reads: Literal["normalised", "uint8"] = "normalised"
    batch: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, or their numbers where they have none."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        return (self.channels, *height_width(self.input_size))

    @property
    def method(self) -> str | None:
        """Name of the method; None when unknown."""
        return self.origin.get("method")

    @property
    def teacher(self) -> str | None:
        """Names of the teachers; None without one."""
        return self.origin.get("teacher")

    @property
    def data(self) -> str | None:
        """Name of the data that the network was trained on; None when unknown."""
        return self.origin.get("data")

    @property
    def date(self) -> str | None:
        """Day of the export, such as 2026-01-31; None when unknown."""
        return self.origin.get("date")

    def replace(self, **changes: Any) -> Description:
        """Return a copy with other values.

        Args:
            **changes: Values by the name of the attribute.
        """
        return dataclasses.replace(self, **changes)

    def metadata(self) -> dict[str, str]:
        """Return the description as text by name: text as it is, everything else as JSON.

        Examples:
            >>> network = Description("resnet20", 2, 32, class_names=("cat", "dog"))
            >>> network.metadata()["class_names"]
            '["cat", "dog"]'
            >>> Description.from_metadata(network.metadata(), "a.safetensors") == network
            True
        """
        values: dict[str, Any] = {
            "model": self.model,
            "model_options": dict(self.options) or None,
            "head": self.head,
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "input_size": self.input_size,
            "channels": self.channels,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "value_range": self.value_range,
            "background": self.background,
            "pixels": self.pixels,
            **{f"{each.part}_acc": round(each.value, 6) for each in self.accuracy},
            **{f"{each.part}_count": each.count for each in self.accuracy},
            **self.origin,
            "versions": dict(self.versions) or None,
            "checked": self.checked,
            "quantization": self.quantization,
            "dtype": self.dtype,
            "reads": self.reads,
            "batch": self.batch,
        }
        return as_text(values)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], origin: str) -> Description:
        """Read a description.

        Args:
            metadata: Text by name, as `metadata` returns it.
            origin: Name of the file in messages.

        Raises:
            ACKDError: If the text does not state which network it belongs to, or an entry has a value that it cannot
                have.
        """
        known = typed_metadata(metadata, origin)
        try:
            classes, model = int(metadata["num_classes"]), metadata["model"]
            plain = {
                key: json.loads(metadata.get(key, "null")) for key in ("model_options", "head", "versions", "batch")
            }
            for key, kind in (("model_options", dict), ("head", dict), ("versions", dict), ("batch", int)):
                if plain[key] is not None and type(plain[key]) is not kind:
                    raise ValueError(key)
            if plain["batch"] is not None and plain["batch"] < 1:
                raise ValueError("batch")
        except (KeyError, ValueError, RecursionError) as error:
            raise ACKDError(
                f"{origin} does not state which network it has and how images are prepared; name a file that "
                "`ackd export` wrote"
            ) from error
        if (names := known.get("class_names")) is not None and len(names) != classes:
            raise ACKDError(
                f"class_names in the metadata of {origin} are not the names of its {classes} classes; export the file "
                "again"
            )
        if "input_size" not in known:
            raise ACKDError(f"{origin} does not state the size of its images (input_size); export it again")
        accuracy = tuple(
            Accuracy(part, known[f"{part}_acc"], known.get(f"{part}_count"))
            for part in ("val", "test")
            if f"{part}_acc" in known
        )
        stated = {key: known[key] for key in _PREPROCESSING if key in known}
        stated |= {key: metadata[key] for key in ("background", "checked", "quantization", "dtype") if key in metadata}
        return cls(
            model,
            classes,
            options=plain["model_options"] or {},
            head=plain["head"],
            class_names=None if names is None else tuple(names),
            accuracy=accuracy,
            origin={key: metadata[key] for key in ORIGIN if key in metadata},
            versions=plain["versions"] or {},
            batch=plain["batch"],
            **{"channels": len(known.get("mean", (0, 0, 0))), **stated},
        )

    def lines(self) -> list[str]:
        """Return what a person wants to know, one thing in each line."""
        height, width = height_width(self.input_size)
        what = f"{self.model}, {self.dtype}" if self.quantization is None else f"{self.model}, {self.quantization}"
        options = f" ({', '.join(f'{key} {value}' for key, value in self.options.items())})" if self.options else ""
        names = ", ".join(self.names[:8]) + (", …" if self.num_classes > 8 else "")
        found = [
            f"network: {what}{options}" + (f", with the head of {self.method}" if self.head else ""),
            f"classes: {self.num_classes:,} ({names if self.class_names else 'names unknown'})",
            f"images: {self.channels} x {height} x {width}, {self._preparation()}",
        ]
        if self.reads == "uint8":
            found.append("input: uint8 images of that size; conversion and normalisation are part of the network")
        if self.batch is not None:
            found.append(f"batch: 1 to {self.batch} images" if self.batch > 1 else "batch: 1 image")
        for each in self.accuracy:
            of = f" of {each.count:,} images" if each.count is not None else ""
            part = {"val": "validation"}.get(each.part, each.part)
            found.append(f"accuracy: {each.value:.2%}{of} ({part}{f', {self.data}' if self.data else ''})")
        found += [f"{key.replace('_', ' ')}: {self.origin[key]}" for key in ORIGIN if key in self.origin]
        if self.versions:
            found.append("versions: " + ", ".join(f"{name} {number}" for name, number in self.versions.items()))
        found.append(f"checked: {self.checked or 'not stated'}")
        return found

    def _preparation(self) -> str:
        if self.crop_pct is None:
            crop = "how they were resized is not stated"
        elif self.crop_pct == 1:
            crop = f"resized until they cover it ({self.interpolation}), centre crop"
        else:
            crop = f"resized until they cover 1/{self.crop_pct:.3f} of it ({self.interpolation}), centre crop"
        if self.mean is None or self.std is None:
            return f"{crop}, normalisation not stated"
        if self.value_range is not None:
            low, high = self.value_range
            crop += f", pixels from {low:g} to {high:g} become 0 to 1"
        mean, std = (" ".join(f"{each:.4g}" for each in values) for values in (self.mean, self.std))
        return f"{crop}, mean {mean}, std {std}"


_PREPROCESSING = (
    "input_size",
    "channels",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "value_range",
    "pixels",
    "reads",
)
