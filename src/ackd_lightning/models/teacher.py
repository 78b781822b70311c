"""Teachers: a network that is frozen for good, one that a method may train, and how a configuration names them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.features import check_plan, image_channels, plan_for, staged_forward, watch
from ackd_lightning.models.fusion import fused
from ackd_lightning.models.metadata import LARGEST_INPUT, typed_metadata
from ackd_lightning.models.tracing import clone
from ackd_lightning.models.weights import load_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import ImageSize, NetOutput, height_width
from ackd_lightning.validation import Positive, Range, check_arguments

Gate = Literal["stop", "warn", "off"]


@dataclass(frozen=True)
class TeacherConfig:
    """A teacher with its weights, its preprocessing, and how it is run and checked.

    Args:
        network: Name for ``create_model`` (such as resnet110), or a network.
        weights: Weight file of a network that is given by name.
        options: Options for ``create_model``; none by default.
        mean: Mean of each channel, of pixels in 0 to 1, that the teacher was trained with. None for the one in the
            weight file, or else the data's.
        std: Standard deviation of each channel, as mean.
        input_size: Height and width in pixels of the images that the teacher was trained with. None for the size in
            the weight file, or else the data's.
        bf16: Run the teacher in bfloat16; its weights stay as they are and its logits are returned in float32.
        gate: Reaction to a teacher whose validation accuracy before the first step is near chance or far below the
            accuracy in its weight file. "stop" ends the run, "warn" continues it, "off" skips the measurement.
        cache: Folder of `ackd cache` with the teacher's logits for every augmented view; the teacher is not run then.

    Raises:
        ACKDError: If a value is not allowed, or values contradict each other.
    """

    network: str | nn.Module
    weights: str | None = None
    options: dict[str, Any] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    input_size: Annotated[int, Range(1, LARGEST_INPUT)] | None = None
    bf16: bool = False
    gate: Gate = "stop"
    cache: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_arguments(type(self), vars(self))
        given = isinstance(self.network, nn.Module)
        if not given and not isinstance(self.network, str):
            raise ACKDError(
                f"network is {self.network!r} in TeacherConfig; it must be a name for create_model or a network"
            )
        if self.options is not None and not isinstance(self.options, dict):
            raise ACKDError(
                f"options is {self.options!r} in TeacherConfig; it must be a dict of create_model's options"
            )
        if given and self.weights is not None:
            raise ACKDError(
                f"weights is {self.weights!r} in TeacherConfig and the teacher is a network; load the file with "
                "load_weights first, or give the network by name"
            )
        if given and self.options:
            raise ACKDError(
                f"options is {self.options!r} in TeacherConfig and the teacher is a network; build it with these "
                "options, or give it by name"
            )
        if len(self.mean or ()) != len(self.std or ()):
            raise ACKDError(
                f"mean is {self.mean} and std is {self.std} in TeacherConfig; give both, with one number per channel"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values) if values else None)


class Teacher(nn.Module):
    """Network that gets images in its own normalisation and size, and through which gradients flow.

    Args:
        network: Any network that maps images to logits.
        mean: Mean of each channel that the network was trained with; None for the data's.
        std: Standard deviation of each channel, as ``mean``.
        input_size: Height and width in pixels that the network was trained with; None for the data's.

    Raises:
        ACKDError: If the network's stage plan is wrong.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: ImageSize | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.plan = plan_for(network)
        watch(network, self.plan)
        self._own = (tuple(mean) if mean else None, tuple(std) if std else None, input_size)
        self._plan_checked = self.plan is None
        self.input_size = input_size
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        if input_size is not None:
            self._check_plan(input_size)

    def _check_plan(self, input_size: ImageSize) -> None:
        if self.plan is not None and not self._plan_checked:
            check_plan(self.network, self.plan, input_size, image_channels(self.network))
            self._plan_checked = True

    def take(self, other: Teacher) -> None:
        """Copy the weights, the normalisation and the image size of another teacher.

        Args:
            other: Teacher of the same architecture.
        """
        self.network.load_state_dict(other.network.state_dict())
        self.input_size = other.input_size
        device = next((each.device for each in self.network.parameters()), torch.device("cpu"))
        for name in ("scale", "shift"):
            value = getattr(other, name)
            setattr(self, name, None if value is None else value.clone().to(device))

    def adapt_to(self, mean: Sequence[float] | None, std: Sequence[float] | None, input_size: ImageSize) -> None:
        """Set how the images that the teacher will get are normalised, so that it can convert them to its own.

        The network's stage plan is compared with its own forward, unless the constructor has done so.

        Args:
            mean: Mean of each channel of the data. None when unknown: images are not converted.
            std: Standard deviation of each channel, as ``mean``.
            input_size: Height and width of the data's images in pixels.

        Raises:
            ACKDError: If the teacher reads another number of channels, or its stage plan is wrong.
        """
        own_mean, own_std, own_size = self._own
        self.input_size = None if own_size == input_size else own_size
        self._check_plan(own_size or input_size)
        self.scale = self.shift = None
        if mean is None or std is None or own_mean is None or own_std is None:
            if own_mean is not None and own_std is not None:
                warnings.warn(
                    "the normalisation of the data is unknown, so the teacher gets images without conversion to its "
                    "own normalisation; pass mean and std of the data to the module",
                    stacklevel=2,
                )
            return
        if tuple(mean) == own_mean and tuple(std) == own_std:
            return
        if len(mean) != len(own_mean):
            raise ACKDError(
                f"the teacher was trained on images with {len(own_mean)} channels and the data have {len(mean)}; "
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
        """Convert images to the teacher's normalisation and size, and run the network on them.

        Args:
            image: Images as the student gets them, ``B x C x H x W``.

        Returns:
            Logits, stage outputs and embedding.
        """
        if self.scale is not None and self.shift is not None:
            image = image * self.scale + self.shift
        if self.input_size is not None:
            image = F.interpolate(
                image, size=height_width(self.input_size), mode="bilinear", antialias=True, align_corners=False
            )
        return staged_forward(self.running(), self.plan, image)

    def running(self) -> nn.Module:
        """Return the network that ``forward`` runs."""
        return self.network


class FrozenTeacher(Teacher):
    """Teacher that stays in evaluation mode and computes no gradient.

    It holds a copy of the network, so that the one that was passed stays as it is and can be trained. Training modules
    hold the teacher outside their module tree: it is in no checkpoint, no optimizer and no DDP bucket.

    Args:
        network: Any network that maps images to logits.
        mean: Mean of each channel that the network was trained with; None for the data's.
        std: Standard deviation of each channel, as ``mean``.
        input_size: Height and width in pixels that the network was trained with; None for the data's.
        bf16: Run the forward pass in bfloat16; weights stay as they are and logits are returned in float32.
        metadata: Text about the network; ``test_acc`` or ``val_acc``, from 0 to 1, is read by the teacher gate.
        copy_network: Copy the network. False freezes the one that is passed and saves the memory of a copy.

    Raises:
        ACKDError: If the network's stage plan is wrong.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: ImageSize | None = None,
        bf16: bool = False,
        metadata: dict[str, str] | None = None,
        copy_network: bool = True,
    ) -> None:
        own = clone(network) if copy_network else network
        for parameter in own.parameters():  # the method of a network that was compiled by TorchScript raises
            parameter.requires_grad_(False)
        super().__init__(own.eval(), mean=mean, std=std, input_size=input_size)
        self.bf16 = bf16
        self.metadata = dict(metadata or {})
        self.training = False
        self.fused: nn.Module | None = None
        self.class_order: Tensor | None
        self.register_buffer("class_order", None, persistent=False)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the network's classes in the order of its logits; None where its weight file has none."""
        stated = typed_metadata(self.metadata, "the teacher's weight file")
        return tuple(stated["class_names"]) if "class_names" in stated else None

    def reorder_classes(self, names: Sequence[str]) -> bool:
        """Return logits in the order of the data's classes from now on.

        Args:
            names: Names of the data's classes, the same set as `class_names`.

        Returns:
            Whether the order differs from the network's own.
        """
        own = self.class_names or ()
        place = {name: number for number, name in enumerate(own)}
        order = [place[name] for name in names]
        device = next((each.device for each in self.network.parameters()), torch.device("cpu"))
        changed = order != list(range(len(own)))
        self.class_order = torch.tensor(order, device=device) if changed else None
        return changed

    @classmethod
    def from_name(
        cls,
        name: str,
        num_classes: int,
        *,
        weights: str,
        options: dict[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: ImageSize | None = None,
        bf16: bool = False,
    ) -> FrozenTeacher:
        """Build a teacher from a model name and a weight file.

        Args:
            name: Name for ``create_model``.
            num_classes: Number K of classes.
            weights: Weight file.
            options: Options for ``create_model``.
            mean: Mean of each channel that the network was trained with; None for the one in the file's metadata.
            std: Standard deviation of each channel, as ``mean``.
            input_size: Height and width in pixels that the network was trained with; None for the size in the file's
                metadata.
            bf16: Run the forward pass in bfloat16.

        Raises:
            ACKDError: If the file is missing, is not a weight file, or does not fit the network.
        """
        network = create_model(name, num_classes, **(options or {}))
        metadata = load_weights(network, weights, name=name)
        stated = typed_metadata(metadata, weights)
        return cls(
            network,
            mean=mean or stated.get("mean"),
            std=std or stated.get("std"),
            input_size=input_size or stated.get("input_size"),
            bf16=bf16,
            metadata=metadata,
            copy_network=False,
        )

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> FrozenTeacher:
        """Stay frozen, whatever ``requires_grad`` is."""
        super().requires_grad_(False)
        return self

    def fuse(self, input_size: ImageSize) -> bool:
        """Run a copy of the network from now on whose BatchNorms are fused: faster, with different rounding.

        Args:
            input_size: Height and width of the data's images in pixels.

        Returns:
            Whether that is possible; if not, the network itself is run as before.
        """
        height, width = height_width(self.input_size or input_size)
        image = torch.randn(
            2, image_channels(self.network), height, width, generator=torch.Generator().manual_seed(0), device="cpu"
        )
        place = next(self.network.parameters(), image)
        image = image.to(place.device, place.dtype)

        def run(network: nn.Module) -> list[Tensor]:
            output = staged_forward(network, self.plan, image)
            embedding = () if output.embedding is None else (output.embedding,)
            return [output.logits, *(output.features or ()), *embedding]

        self.fused = fused(self.network, run)
        return self.fused is not None

    def running(self) -> nn.Module:
        """Return the network that ``forward`` runs: the teacher's own, or its fused copy."""
        return self.network if self.fused is None else self.fused

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self  # it never changes: an EMA copy of the student shares its teacher

    @torch.no_grad()
    def forward(self, image: Tensor) -> NetOutput:
        """Convert images to the teacher's normalisation and size, and run the network without gradient.

        Args:
            image: Images as the student gets them, ``B x C x H x W``.

        Returns:
            Logits in float32, stage outputs and embedding.
        """
        with torch.autocast(image.device.type, dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            out = super().forward(image)
        logits = out.logits.float()
        return NetOutput(
            logits if self.class_order is None else logits[:, self.class_order], out.features, out.embedding
        )
