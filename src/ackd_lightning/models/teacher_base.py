"""What every teacher does: its images are converted from those of the student, and its network is run on them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import image_channels
from ackd_lightning.models.features import staged_forward, watch
from ackd_lightning.models.finding import check_plan, plan_for
from ackd_lightning.models.preprocessing import (
    Conversion,
    Interpolation,
    Preprocessing,
    channels_of,
    stated_by,
    usable_size,
)
from ackd_lightning.types import DataInfo, ImageSize, NetOutput


class Teacher(nn.Module):
    """Network that gets images in its own normalisation and size, and through which gradients flow.

    What is not given is taken from the network itself where it says so (timm's ``pretrained_cfg``).

    Args:
        network: Any network that maps images to logits.
        mean: Mean of each channel, of pixels in 0 to 1, that the network was trained with.
        std: Standard deviation of each channel, as ``mean``.
        input_size: Side in pixels of the images that the network was trained with, or their height and width; None
            for the data's.
        interpolation: How images of another size are resized; None for the network's own, or else ``bilinear``.

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
        interpolation: Interpolation | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.plan = plan_for(network)
        watch(network, self.plan)
        self.given = Preprocessing(
            tuple(mean) if mean else None, tuple(std) if std else None, input_size, interpolation
        )
        self.conversion = Conversion()
        self._plan_checked = self.plan is None
        if input_size is not None:
            self._check_plan(input_size, image_channels(network))

    def _check_plan(self, input_size: ImageSize, channels: int) -> None:
        if self.plan is not None and not self._plan_checked:
            check_plan(self.network, self.plan, input_size, channels)
            self._plan_checked = True

    @property
    def name(self) -> str:
        """Name of the network in messages: that for `create_model`, or its class."""
        return str(getattr(self.network, "model_name", None) or type(self.network).__name__)

    @property
    def input_size(self) -> ImageSize | None:
        """Height and width to which images are resized; None while they keep the data's."""
        return self.conversion.size

    def take(self, other: Teacher) -> None:
        """Copy the weights and the conversion of images of another teacher.

        Args:
            other: Teacher of the same architecture.
        """
        self.network.load_state_dict(other.network.state_dict())
        self.conversion = copy.deepcopy(other.conversion).to(self._place().device)

    def _place(self) -> Tensor:
        return next(self.network.parameters(), torch.empty(0))

    def adapt_to(self, data: DataInfo) -> None:
        """Set how the images that the teacher will get look, so that it can convert them to its own.

        The network's stage plan is compared with its own forward, once.

        Args:
            data: Size, channels and normalisation of the data.

        Raises:
            ACKDError: If the teacher cannot read images of its size, its channels cannot be converted, or its stage
                plan is wrong.
        """
        own, stated = self.given, stated_by(self.network)
        channels = channels_of(self.network, own, data.image_shape[0])
        size = usable_size(
            self.network,
            data,
            given=own.input_size,
            stated=stated.input_size,
            channels=channels,
            name=f"teacher {self.name}",
        )
        if self.plan is None:
            self.plan = plan_for(self.network, size)
            watch(self.network, self.plan)
        self._check_plan(size, channels)
        complete = replace(own.filled(stated), input_size=size)
        conversion = Conversion(complete, data, channels=channels, name=f"teacher {self.name}")
        self.conversion = conversion.to(self._place().device).train(self.training)

    def forward(self, image: Tensor) -> NetOutput:
        """Convert images to the teacher's own, and run the network on them.

        Args:
            image: Images as the student gets them, ``B x C x H x W``.

        Returns:
            Logits, stage outputs and embedding.
        """
        own = self._place().dtype
        image = self.conversion(image)
        return staged_forward(self.running(), self.plan, image.to(own) if own.is_floating_point else image)

    def running(self) -> nn.Module:
        """Return the network that ``forward`` runs."""
        return self.network


class NoLogitsError(ACKDError):
    """A method reads the logits of a teacher whose features alone are used."""


class FeaturesOnly(NetOutput):
    """Output of a teacher whose classes are not those of the data: features and embedding, no logits.

    Args:
        output: Output of the network.
        name: Name of the teacher in the message.
    """

    __slots__ = ("name",)
    name: str

    def __init__(self, output: NetOutput, name: str) -> None:
        for key, value in (("features", output.features), ("embedding", output.embedding), ("branches", ())):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "name", name)

    @property
    def logits(self) -> Tensor:
        """Nothing: the error that names the remedy.

        Raises:
            NoLogitsError: Always.
        """
        raise NoLogitsError(
            f"class_map of teacher {self.name} is features and the method reads its logits; map its classes to those "
            "of the data, or choose a method that reads features alone"
        )
