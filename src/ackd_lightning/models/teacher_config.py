"""How a configuration names a teacher: network, weights, preprocessing, classes, and how it is run and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.class_map import read_class_map
from ackd_lightning.models.config_checks import check_network
from ackd_lightning.models.metadata import LARGEST_INPUT
from ackd_lightning.models.preprocessing import Interpolation, Preprocessing
from ackd_lightning.validation import Positive, Range, check_arguments

Gate = Literal["stop", "warn", "off"]

_Side = Annotated[int, Range(1, LARGEST_INPUT)]


@dataclass(frozen=True)
class TeacherConfig:
    """A teacher with its weights, its preprocessing and classes, and how it is run and checked.

    Args:
        network: Name for ``create_model`` (such as resnet110), or a network. It has to be given.
        weights: Weight file; for a network that is given as such, None for the weights that it has.
        pretrained: Use the weights that timm or torchvision publish for the network, with their own classes and
            preprocessing; they are downloaded unless they are in the library's cache.
        options: Options for ``create_model``; none by default.
        mean: Mean of each channel, of pixels in 0 to 1, that the teacher was trained with. None for the one in the
            weight file or of timm's network; without either, images stay normalised as for the student.
        std: Standard deviation of each channel, as mean. A network that reads pixels from 0 to 255 has mean 0 and std
            1/255.
        input_size: Side in pixels of the images that the teacher was trained with, or their height and width. None
            for the size in the weight file or of published weights, or else the data's where the network can read it.
        interpolation: How images of another size are resized. None for that of the weights, or else bilinear.
        class_map: Teacher's class, or several that are pooled, for each class of the data, by name or number: a
            mapping, a list in the order of the data's classes, or a YAML or JSON file with either. "features" for a
            teacher of other classes whose features alone are used. None for the same classes, matched by their names
            where both have names.
        taps: Names of the modules whose outputs are the stages; None for those that are found in the network.
        ensemble_weight: Weight of the teacher's logits in the mean over several teachers, relative to the others.
        bf16: Run the teacher in bfloat16; its weights stay as they are and its logits are returned in float32.
        gate: Reaction to a teacher whose validation accuracy before the first step is near chance, far below the
            accuracy in its weight file, or much better with its classes in another order. "stop" ends the run, "warn"
            continues it, "off" skips the measurement.
        cache: Folder of `ackd cache` with the teacher's logits for every augmented view; the teacher is not run then.

    Raises:
        ACKDError: If a value is not allowed, or values contradict each other.
    """

    network: str | nn.Module = ""
    weights: str | None = None
    pretrained: bool = False
    options: dict[str, Any] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    input_size: _Side | tuple[_Side, _Side] | None = None
    interpolation: Interpolation | None = None
    class_map: dict[str | int, Any] | list[Any] | str | None = None
    taps: tuple[str, ...] | None = None
    ensemble_weight: Positive = 1.0
    bf16: bool = False
    gate: Gate = "stop"
    cache: str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_arguments(type(self), {key: each for key, each in vars(self).items() if key != "class_map"})
        check_network(self, "teacher")
        if not isinstance(self.network, nn.Module) and not self.network:
            given_too = [
                f"{name} is {getattr(self, name)!r}" for name in ("pretrained", "weights") if getattr(self, name)
            ]
            begin = f"{' and '.join(given_too)} and " if given_too else ""
            raise ACKDError(f"{begin}the teacher has no network; name one, such as teacher.network resnet18")
        for name in ("mean", "std"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values) if values else None)
        if isinstance(self.input_size, (list, tuple)):
            if len(self.input_size) != 2:
                raise ACKDError(f"input_size is {self.input_size} in TeacherConfig; give one side, or height and width")
            object.__setattr__(self, "input_size", tuple(self.input_size))
        object.__setattr__(self, "taps", None if self.taps is None else tuple(self.taps))
        if self.class_map is not None:
            object.__setattr__(self, "class_map", read_class_map(self.class_map))
        self.preprocessing()

    def preprocessing(self) -> Preprocessing:
        """Return the images that were given for the teacher."""
        return Preprocessing(self.mean, self.std, self.input_size, self.interpolation)
