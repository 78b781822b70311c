"""Grad-CAM of teacher, target learner and auxiliary learners on the same images (Selvaraju et al., 2017).

The ACKD paper shows it in Fig. 3. The maps are computed by the library grad-cam for the true class, at the last feature
map of each network that its logits depend on: a classifier that reads a class token alone ignores the positions of the
last block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.extras import require
from ackd_lightning.models.features import StagePlan
from ackd_lightning.models.outputs import as_map


@dataclass(frozen=True)
class Source:
    """A network whose heat maps are drawn.

    Attributes:
        name: Name above its column.
        module: Module that owns all parameters.
        logits: Function from normalised images to logits, which runs ``layers``.
        layers: Modules whose outputs are the feature maps, the last one first.
        prefix: Number of tokens before those of the positions; None for maps.
        reader: Network whose images have the shape of the maps; None where it reads those that ``logits`` gets.
    """

    name: str
    module: nn.Module
    logits: Callable[[Tensor], Tensor]
    layers: tuple[nn.Module, ...]
    prefix: int | None = None
    reader: nn.Module | None = None

    @classmethod
    def of(
        cls,
        name: str,
        module: nn.Module,
        network: nn.Module,
        plan: StagePlan | None,
        logits: Callable[[Tensor], Tensor],
    ) -> Source:
        """Find the feature maps of a network.

        Args:
            name: Name above its column.
            module: Module that owns all parameters.
            network: Network that the plan describes.
            plan: Stages of the network.
            logits: Function from normalised images to logits.

        Raises:
            ACKDError: If its stages are unknown.
        """
        if plan is None:
            raise ACKDError(f"the stages of {name} are unknown, so it has no feature map for Grad-CAM")
        layers = tuple(network.get_submodule(each) for each in reversed(plan.features))
        return cls(name, module, logits, layers, getattr(network, "num_prefix_tokens", None), network)


class _AsModule(nn.Module):
    """The form that the library runs."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.module, self.logits = source.module, source.logits

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(image)


def heat_maps(
    source: Source, images: Tensor, target: Tensor, background: NDArray[np.float32]
) -> tuple[NDArray[np.float32], Tensor]:
    """Compute the maps of one network, laid over the images.

    Args:
        source: Network.
        images: ``N x C x H x W`` normalised, on the device of the network.
        target: ``N`` class indices that the maps explain.
        background: ``N x H x W x 3`` from 0 to 1.

    Returns:
        Overlays ``N x H x W x 3`` from 0 to 1, and ``N`` predicted class indices.

    Raises:
        ACKDError: If the library is missing, or the network's output is not a map.
    """
    library: Any = require("pytorch_grad_cam", "gradcam", "Grad-CAM in a report")
    image_tools: Any = require("pytorch_grad_cam.utils.image", "gradcam", "Grad-CAM in a report")
    targets: Any = require("pytorch_grad_cam.utils.model_targets", "gradcam", "Grad-CAM in a report")
    read = images

    def reads(_: nn.Module, given: tuple[Any, ...]) -> None:
        nonlocal read
        read = given[0]  # a teacher resizes images

    def as_maps(value: Any) -> Tensor:
        found = as_map(value, read.shape[2] / read.shape[3], source.prefix)
        if found is None:
            raise ACKDError(f"a feature of {source.name} is not a map, so it has no Grad-CAM")
        return found

    wanted = [targets.ClassifierOutputTarget(label) for label in target.tolist()]
    model = _AsModule(source)
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    watched = None if source.reader is None else source.reader.register_forward_pre_hook(reads)
    for layer in source.layers:
        with (
            torch.enable_grad(),
            library.GradCAM(model=model, target_layers=[layer], reshape_transform=as_maps) as cam,
        ):
            maps = cam(input_tensor=images.detach().clone().requires_grad_(), targets=wanted)
            answers = cam.outputs.argmax(dim=1).detach().cpu()
            reached = any(bool(each.any()) for each in cam.activations_and_grads.gradients)
        if reached:
            break
    if watched is not None:
        watched.remove()
    for name, parameter in model.named_parameters():
        parameter.grad = before[name]
    overlays = [
        image_tools.show_cam_on_image(picture, each, use_rgb=True).astype(np.float32) / 255
        for picture, each in zip(background, maps, strict=True)
    ]
    return np.stack(overlays), answers
