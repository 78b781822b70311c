"""Teacher that is frozen for good."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.models.class_map import ClassSelection, TeacherClasses
from ackd_lightning.models.copies import WATCH, clone, image_channels
from ackd_lightning.models.features import staged_forward
from ackd_lightning.models.fusion import fused
from ackd_lightning.models.metadata import as_text, typed_metadata
from ackd_lightning.models.preprocessing import Interpolation, Preprocessing, channels_of, closest_interpolation
from ackd_lightning.models.stated import stated_options
from ackd_lightning.models.teacher_base import FeaturesOnly, Teacher
from ackd_lightning.models.weights import digest, load_weights, state_digest
from ackd_lightning.models.zoo import create_model
from ackd_lightning.models.zoo.pretrained import pretrained
from ackd_lightning.types import DataInfo, ImageSize, NetOutput, height_width


class FrozenTeacher(Teacher):
    """Teacher that stays in evaluation mode and computes no gradient.

    It holds a copy of the network, so that the one that was passed stays as it is and can be trained. Training modules
    hold the teacher outside their module tree: it is in no checkpoint, no optimizer and no DDP bucket. Each has a view
    of it (`for_data`) that knows the module's data.

    Args:
        network: Any network that maps images to logits, in any floating-point type.
        mean: Mean of each channel, of pixels in 0 to 1, that the network was trained with. None for the one in
            ``metadata``, or that the network states itself.
        std: Standard deviation of each channel, as ``mean``.
        input_size: Side in pixels of the images that the network was trained with, or their height and width; None as
            for ``mean``, or else the data's where the network can read it.
        interpolation: How images of another size are resized; None as for ``mean``, or else ``bilinear``.
        bf16: Run the forward pass in bfloat16; weights stay as they are and logits are returned in float32.
        metadata: Text about the network, as in a weight file: preprocessing, ``class_names``, and ``test_acc`` or
            ``val_acc``, from 0 to 1, which the teacher gate reads.
        copy_network: Copy the network. False freezes the one that is passed and saves the memory of a copy.

    Attributes:
        selection: Classes that the logits are of, where they are not the network's own.
        features_only: Whether the network's logits are not used.
        gives_probabilities: Whether the network ends in a softmax, whose logarithm is then taken.

    Raises:
        ACKDError: If metadata make no sense.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        input_size: ImageSize | None = None,
        interpolation: Interpolation | None = None,
        bf16: bool = False,
        metadata: dict[str, str] | None = None,
        copy_network: bool = True,
    ) -> None:
        if any(isinstance(each, nn.parameter.UninitializedParameter) for each in network.parameters()):
            raise ACKDError(
                f"the teacher {type(network).__name__} has lazy layers without a shape; run it on an image first"
            )
        if any(each.is_meta for each in itertools.chain(network.parameters(), network.buffers())):
            raise ACKDError(
                f"the teacher {type(network).__name__} has no weights, because it is on the meta device; build it on "
                "the CPU"
            )
        if tiny := {str(each.dtype) for each in network.parameters() if each.is_floating_point() and each.itemsize < 2}:
            raise ACKDError(
                f"the teacher {type(network).__name__} has weights of the type {min(tiny)}, with which nothing is "
                "computed; convert it with teacher.float()"
            )
        own = clone(network) if copy_network else network
        for parameter in own.parameters():  # the method of a network that was compiled by TorchScript raises
            parameter.requires_grad_(False)
        super().__init__(own.eval(), mean=mean, std=std, input_size=input_size, interpolation=interpolation)
        self.bf16 = bf16
        self.metadata = dict(metadata or {})
        self.stated = typed_metadata(self.metadata, f"the weight file of teacher {self.name}")
        file = Preprocessing(
            self.stated.get("mean"),
            self.stated.get("std"),
            self.stated.get("input_size"),
            self.stated.get("interpolation"),
            self.metadata.get("preprocessing_origin", "its weight file"),
        )
        self.given = self.given.filled(file)
        self.training = False
        self.fused: nn.Module | None = None
        self.selection: ClassSelection | None = None
        self.features_only = self.gives_probabilities = False

    @property
    def name(self) -> str:
        """Name of the network in messages: that of its weight file or for `create_model`, or its class."""
        return self.metadata.get("model") or super().name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the network's classes in the order of its logits; None where its weight file has none."""
        return tuple(self.stated["class_names"]) if "class_names" in self.stated else None

    def classes(self, count: int) -> TeacherClasses:
        """Return the network's classes by number, name and words.

        Args:
            count: Number of the network's logits.

        Raises:
            ACKDError: If the file has another number of names.
        """
        names, labels = self.stated.get("class_names"), self.stated.get("class_labels")
        for each in (names, labels):
            if each is not None and len(each) != count:
                raise ACKDError(
                    f"the weight file of teacher {self.name} names {len(each)} classes and the network has {count}; "
                    "export the file again"
                )
        return TeacherClasses(count, names, labels)

    def select_classes(self, groups: Sequence[Sequence[int]]) -> None:
        """Return logits of other classes from now on.

        Args:
            groups: Numbers of the network's classes that form each class of the data.
        """
        self.selection = ClassSelection(groups).to(self._place().device).eval()

    def for_data(self, data: DataInfo) -> FrozenTeacher:
        """Return a view of this teacher for some data: the same network, with a conversion and classes of its own.

        Args:
            data: Size, channels and normalisation of the data.

        Raises:
            ACKDError: As `adapt_to`.
        """
        view = self.view()
        view.adapt_to(data)
        return view

    def view(self) -> FrozenTeacher:
        """Return another teacher with the same network, whose classes and conversion can change without this one's."""
        view = copy.copy(self)
        for part in ("_buffers", "_modules"):
            view.__dict__[part] = dict(self.__dict__[part])
        view.metadata = dict(self.metadata)
        return view

    def with_own_stages(self) -> FrozenTeacher:
        """Return a view of the same weights whose stages can be named without changing this one's."""
        view = self.view()
        network = copy.copy(self.network)
        network.__dict__.pop(WATCH, None)
        view._modules["network"] = network
        view._plan_checked = False
        return view

    def own_network(self) -> None:
        """Copy what this view shares with other views, so that it can be moved or converted alone."""
        self._modules.update({name: part and clone(part) for name, part in self._modules.items()})

    @torch.no_grad()
    def find_softmax(self, data: DataInfo) -> bool:
        """Run the network on three random images and find out whether it returns probabilities.

        Their logarithm is taken from now on; with the same softmax after it, that is what the network computes.

        Args:
            data: Size and channels of the data.

        Returns:
            Whether each row of its outputs is positive and sums to 1.

        Raises:
            ACKDError: If the network runs on no other number of images than the two that its shapes were found with.
        """
        place = self._place()
        image = torch.randn(3, *data.image_shape, generator=torch.Generator().manual_seed(0)).to(place.device)
        try:
            scores = super().forward(image).logits.float().cpu().double()  # MPS has no float64
        except ACKDError:
            raise
        except Exception as error:
            reason = first_line(error)
            raise ACKDError(
                f"teacher {self.name} fails on 3 images at once and runs on 2 ({reason}); let it read batches of any "
                "size (torch.export: give dynamic_shapes)"
            ) from error
        positive = bool((scores >= 0).all()) and scores.shape[1] > 1
        self.gives_probabilities = positive and bool(((scores.sum(dim=1) - 1).abs() < 0.01).all())
        return self.gives_probabilities

    def fingerprint(self) -> str:
        """Return the SHA-256 of the weight file, or of the weights of a network that was given."""
        if (of_file := self.metadata.get("sha256")) is not None:
            return of_file
        if "weights_sha256" not in self.metadata:
            self.metadata["weights_sha256"] = state_digest(self.network.state_dict())
        return self.metadata["weights_sha256"]

    def key(self) -> dict[str, Any]:
        """Return everything that this teacher's logits for an image depend on, as plain data."""
        return {
            "model": self.name,
            "weights": self.fingerprint(),
            **self.conversion.own.plain(),
            "classes": self.selection and [list(group) for group in self.selection.groups],
            "probabilities": self.gives_probabilities,
            "bf16": self.bf16,
        }

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
        interpolation: Interpolation | None = None,
        bf16: bool = False,
    ) -> FrozenTeacher:
        """Build a teacher from a model name and a weight file.

        Args:
            name: Name for ``create_model``.
            num_classes: Number K of the network's classes.
            weights: Weight file.
            options: Options for ``create_model``, beside those that the file states.
            mean: Mean of each channel that the network was trained with; None for the one in the file's metadata.
            std: Standard deviation of each channel, as ``mean``.
            input_size: Size of the images that the network was trained with; None for that in the file's metadata.
            interpolation: How images of another size are resized; None for that in the file's metadata.
            bf16: Run the forward pass in bfloat16.

        Raises:
            ACKDError: If the file is missing, is not a weight file, or does not fit the network.
        """
        network = create_model(name, num_classes, **stated_options(name, weights, options))
        metadata = load_weights(network, weights, name=name)
        typed_metadata(metadata, weights)  # its messages name the file
        teacher = cls(
            network,
            mean=mean,
            std=std,
            input_size=input_size,
            interpolation=interpolation,
            bf16=bf16,
            metadata=metadata,
            copy_network=False,
        )
        teacher.metadata["sha256"] = digest(weights)
        return teacher

    @classmethod
    def from_published(cls, name: str, *, options: dict[str, Any] | None = None, **arguments: Any) -> FrozenTeacher:
        """Build a teacher with the weights that timm or torchvision publish, and their own classes.

        Args:
            name: Network of torchvision or ``timm:NAME``.
            options: Further options of the network.
            arguments: Preprocessing and ``bf16``, as for `from_name`.

        Raises:
            ACKDError: If no weights are published, or they cannot be fetched.
        """
        network, facts = pretrained(name, options)
        metadata = as_text(facts)
        metadata |= {"model": name, "preprocessing_origin": f"of {facts['weights']}"}
        if "interpolation" in facts:
            metadata["interpolation"] = closest_interpolation(facts["interpolation"])
        return cls(network, metadata=metadata, copy_network=False, **arguments)

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
            input_size: Side of the data's images in pixels, or their height and width.

        Returns:
            Whether that is possible; if not, the network itself is run as before.
        """
        height, width = height_width(self.input_size or input_size)
        channels = channels_of(self.network, self.given, image_channels(self.network))
        image = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0), device="cpu")
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

    def _precision(self, device: str) -> contextlib.AbstractContextManager[None]:
        """Leave out autocast for weights that are not float32: it would mix their type with another."""
        if self._place().dtype != torch.float32:
            return torch.autocast(device, enabled=False)
        return torch.autocast(device, dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self  # it never changes: an EMA copy of the student shares its teacher

    @torch.no_grad()
    def forward(self, image: Tensor) -> NetOutput:
        """Convert images to the teacher's own, and run the network without gradient.

        Args:
            image: Images as the student gets them, ``B x C x H x W``.

        Returns:
            Logits of the data's classes in float32, stage outputs and embedding in the type of the images.
        """
        return self.with_gradient(image)

    def with_gradient(self, image: Tensor) -> NetOutput:
        """Return what ``forward`` returns, with gradients into the images or into hooks; the weights stay frozen.

        Args:
            image: Images as the student gets them, ``B x C x H x W``.
        """
        with self._precision(image.device.type):
            out = super().forward(image)
        features, embedding = out.features, out.embedding
        if self._place().dtype != image.dtype:
            features = None if features is None else tuple(each.to(image.dtype) for each in features)
            embedding = None if embedding is None else embedding.to(image.dtype)
        output = NetOutput(out.logits.float(), features, embedding)
        if self.features_only:
            return FeaturesOnly(output, self.name)
        logits = output.logits
        if self.gives_probabilities:
            logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
        return NetOutput(self.select(logits), features, embedding)

    def select(self, logits: Tensor) -> Tensor:
        """Return logits of the data's classes, which are those of the network unless others were selected.

        Args:
            logits: Logits of the network's own classes, from the network or from its classifier on another embedding;
                gradients flow into them.
        """
        return logits if self.selection is None else cast(Tensor, self.selection(logits))
