"""Teachers: one that cannot be trained, saved or forgotten in training mode, and one that a method may train."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import plan_for, staged_forward
from ackd_lightning.models.folding import folded
from ackd_lightning.models.weights import load_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import NetOutput
from ackd_lightning.validation import PositiveInt, check_arguments

_LARGEST_INPUT = 4096


def _stated(metadata: Mapping[str, str], weights: str) -> dict[str, Any]:
    """What a weight file says of the images and the accuracy of its network, as numbers.

    Raises:
        ACKDError: naming the entry that makes no sense.
    """
    found: dict[str, Any] = {}
    for key, right, remedy in (
        ("mean", lambda values: len(values) > 0 and all(map(math.isfinite, values)), "a list of numbers"),
        ("std", lambda values: len(values) > 0 and all(0 < each < math.inf for each in values), "numbers above 0"),
        ("input_size", lambda value: type(value) is int and 0 < value <= _LARGEST_INPUT, "a whole number of pixels"),
        ("val_acc", lambda value: 0 <= value <= 1, "a number from 0 to 1"),
        ("test_acc", lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    ):
        if key not in metadata:
            continue
        try:
            found[key] = json.loads(metadata[key])
            good = right(found[key])
        except (ValueError, TypeError, RecursionError):
            good = False
        if not good:
            raise ACKDError(
                f"{weights} says that its {key} is {metadata[key][:60]!r}; it must be {remedy}, so export it again"
            )
    if ("mean" in found) != ("std" in found) or len(found.get("mean", [])) != len(found.get("std", [])):
        raise ACKDError(f"{weights} has mean and std of different lengths; export it again")
    return found


class Teacher(nn.Module):
    """A network fed with its own normalisation and image size, through which gradients flow.

    Args:
        network: any network that maps images to logits.
        mean: per channel, what the network was trained with; None: the data's.
        std: as ``mean``.
        input_size: side in pixels the network was trained with; None: the data's.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.plan = plan_for(network)
        self._own = (tuple(mean) if mean else None, tuple(std) if std else None, input_size)
        self.input_size = input_size
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def set_preprocessing(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, input_size: int | None
    ) -> None:
        """Replace the normalisation and image size that the network was trained with; None keeps a value.

        Args:
            mean: Mean of each channel.
            std: Standard deviation of each channel.
            input_size: Side in pixels.
        """
        own_mean, own_std, own_size = self._own
        self._own = (tuple(mean) if mean else own_mean, tuple(std) if std else own_std, input_size or own_size)
        self.input_size = self._own[2]

    def take(self, other: Teacher) -> None:
        """Become a copy of another teacher: its weights, its normalisation and its image size.

        Args:
            other: of the same architecture.
        """
        self.network.load_state_dict(other.network.state_dict())
        self.input_size = other.input_size
        device = next((each.device for each in self.network.parameters()), torch.device("cpu"))
        for name in ("scale", "shift"):
            value = getattr(other, name)
            setattr(self, name, None if value is None else value.clone().to(device))

    def adapt_to(self, mean: Sequence[float] | None, std: Sequence[float] | None, input_size: int) -> None:
        """Tell the teacher how the images it will get were normalised; it converts them to its own.

        Args:
            mean: of the data, per channel; None: unknown, nothing is converted.
            std: as ``mean``.
            input_size: side of the data's images in pixels.
        """
        own_mean, own_std, own_size = self._own
        self.input_size = None if own_size == input_size else own_size
        self.scale = self.shift = None
        if mean is None or std is None or own_mean is None or own_std is None:
            if own_mean is not None and own_std is not None:
                warnings.warn(
                    "the teacher has its own normalisation and that of the data is unknown, so images reach it "
                    "unchanged; pass mean and std of the data to the module",
                    stacklevel=2,
                )
            return
        if tuple(mean) == own_mean and tuple(std) == own_std:
            return
        if len(mean) != len(own_mean):
            raise ACKDError(
                f"the teacher was trained on images of {len(own_mean)} channels and the data have {len(mean)}; "
                "choose another teacher"
            )
        device = next((each.device for each in self.network.parameters()), torch.device("cpu"))
        data_mean, data_std, target_mean, target_std = (
            torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
            for values in (mean, std, own_mean, own_std)
        )
        self.scale = data_std / target_std
        self.shift = (data_mean - target_mean) / target_std

    def forward(self, image: Tensor) -> NetOutput:
        """Logits, stage outputs and embedding.

        Args:
            image: ``B x C x H x W`` as the student gets it.

        Returns:
            Output of the teacher on its own view of the images.
        """
        if self.scale is not None and self.shift is not None:
            image = image * self.scale + self.shift
        if self.input_size is not None:
            image = F.interpolate(
                image, size=(self.input_size, self.input_size), mode="bilinear", antialias=True, align_corners=False
            )
        return staged_forward(self.running(), self.plan, image)

    def running(self) -> nn.Module:
        """The network that is run."""
        return self.network


class FrozenTeacher(Teacher):
    """A teacher in evaluation mode for ever, without gradient.

    Training modules hold it outside their module tree: it is in no checkpoint, no optimizer, no DDP bucket.

    Args:
        network: any network that maps images to logits.
        mean: per channel, what the network was trained with; None: the data's.
        std: as ``mean``.
        input_size: side in pixels the network was trained with; None: the data's.
        bf16: run the forward pass in bfloat16 (weights stay as they are, logits come back in float32).
        metadata: what is known of it; ``test_acc`` or ``val_acc`` (in [0, 1]) feed the teacher gate.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: int | None = None,
        bf16: bool = False,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(network.requires_grad_(False).eval(), mean=mean, std=std, input_size=input_size)
        self.bf16 = bf16
        self.metadata = dict(metadata or {})
        self.training = False
        self.folded: nn.Module | None = None

    @classmethod
    def from_name(
        cls,
        name: str,
        num_classes: int,
        *,
        weights: str,
        options: dict[str, Any] | None = None,
        bf16: bool = False,
    ) -> FrozenTeacher:
        """Build a teacher from a model name and a weight file; normalisation and size come from the file's metadata.

        Args:
            name: for ``create_model``.
            num_classes: K.
            weights: path of a weight file.
            options: for ``create_model``.
            bf16: as in the constructor.

        Raises:
            ACKDError: when the file is missing, foreign or does not fit.
        """
        network = create_model(name, num_classes, **(options or {}))
        metadata = load_weights(network, weights, name=name)
        stated = _stated(metadata, weights)
        return cls(
            network,
            mean=stated.get("mean"),
            std=stated.get("std"),
            input_size=stated.get("input_size"),
            bf16=bf16,
            metadata=metadata,
        )

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenTeacher:
        """Stay frozen whatever is asked."""
        super().requires_grad_(False)
        return self

    def fuse(self, input_size: int) -> bool:
        """Run a copy of the network from now on whose BatchNorms are inside its convolutions; other rounding, faster.

        Args:
            input_size: side of the data's images in pixels.

        Returns:
            Whether that is possible; otherwise the network itself is run as before.
        """
        side = self.input_size or input_size
        channels = next((each.shape[1] for each in self.network.parameters() if each.dim() == 4), 3)
        image = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
        place = next(self.network.parameters(), image)
        image = image.to(place.device, place.dtype)

        def run(network: nn.Module) -> list[Tensor]:
            output = staged_forward(network, self.plan, image)
            return [output.logits, *output.features, output.embedding]

        self.folded = folded(self.network, run)
        return self.folded is not None

    def running(self) -> nn.Module:
        """The network that is run: the one that was given, or its folded copy."""
        return self.network if self.folded is None else self.folded

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self  # it never changes: an EMA copy of the student shares its teacher

    @torch.no_grad()
    def forward(self, image: Tensor) -> NetOutput:
        """Logits, stage outputs and embedding, all without gradient.

        Args:
            image: ``B x C x H x W`` as the student gets it.

        Returns:
            Output of the teacher on its own view of the images; logits in float32.
        """
        with torch.autocast(image.device.type, dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            out = super().forward(image)
        return NetOutput(out.logits.float(), out.features, out.embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """A teacher with its weights and its preprocessing.

    Attributes:
        network: Model name for `create_model`, or a network with its weights.
        weights: Weight file of a network given by name.
        options: Options for `create_model`.
        mean: Mean of each channel that the network was trained with; None for that of the weight file, or the data's.
        std: Standard deviation of each channel, as ``mean``.
        input_size: Side in pixels that the network was trained with; None for that of the weight file, or the data's.
        bf16: Run the forward pass in bfloat16.
        gate: Test the teacher on validation data before the first step, and ``stop`` the run or ``warn`` when it is
            near chance or far below what its weight file says; ``off`` for no test.
        cache: Folder of ``ackd cache`` with the teacher's logits for every augmented view.
    """

    network: str | nn.Module
    weights: str | None = None
    options: dict[str, Any] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    input_size: PositiveInt | None = None
    bf16: bool = False
    gate: Literal["stop", "warn", "off"] = "stop"
    cache: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_arguments(type(self), {each.name: getattr(self, each.name) for each in fields(self)})
