"""Quantisation to int8 (torchao PT2E): after training with example images, and while a trained network is fine-tuned.

Both start from the graph of the network in evaluation mode: without dropout, and with every BatchNorm after a
convolution folded into its weights. The folded weights are computed in the graph from the weights of both layers, so
that these keep their names and are trained. Nagel et al. (A White Paper on Neural Network Quantization, 2021) discuss
folding before and during the fine-tuning.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import clone, dtype_of, image_channels, load_tensors, name_of
from ackd_lightning.models.int8_graphs import convert, prepare
from ackd_lightning.models.outputs import logits_of
from ackd_lightning.models.start import head_names
from ackd_lightning.models.student_config import Backend
from ackd_lightning.types import ImageSize

CALIBRATION_IMAGES = 512
"""Usual number of training images that the ranges of activations are measured on."""
RANGES_FIXED_AFTER = 0.75
"""Share of the epochs of a fine-tuning after which the ranges of weights and activations stay."""


class _GraphNetwork(nn.Module):
    """Network that is a graph, whose operations do not depend on the mode.

    Attributes:
        body: The graph. Its name is not ``graph``, as torch.export takes that for `GraphModule.graph`.
    """

    body: GraphModule

    def train(self, mode: bool = True) -> Any:
        """Set the mode; torch refuses to set that of a graph."""
        for module in (self, *self.body.modules()):
            module.training = mode
        return self


class Quantized(_GraphNetwork):
    """Network that computes with int8, to be exported.

    Args:
        graph: Graph that maps images ``B x C x H x W`` with any B to logits ``B x K``. It rounds to integers and
            computes in float32, which is slow.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.body = graph
        self.train(False)

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits ``B x K`` of images ``B x C x H x W``."""
        return logits_of(self.body(image))


class FakeQuantized(_GraphNetwork):
    """Trained network whose weights and activations are rounded to int8 in every forward pass, to be fine-tuned.

    Gradients pass the rounding unchanged. In training mode the ranges follow weights and activations as moving
    averages until `fixed_ranges` is set; in evaluation mode they stay. Before the first step there are none, and the
    network computes in float32. BatchNorm uses its running statistics, which stay, and dropout is left out in both
    modes. The graph is computed in float32, also where autocast is on.

    Args:
        network: Network with trained weights; the parameters are shared with it.
        backend: Kernels that the network is for.
        input_size: Height and width of the images in pixels.
        channels: Channels of the images; None for those of the network's first convolution.

    Attributes:
        backend: Kernels that the network is for.
        body: Graph of the network, whose tensors have the names that they have in the network.
        fixed_ranges: Whether the ranges stay in training mode.

    Raises:
        ACKDError: If a library is missing, or the network cannot be written as a graph.
    """

    def __init__(
        self, network: nn.Module, backend: Backend, input_size: ImageSize, *, channels: int | None = None
    ) -> None:
        super().__init__()
        self.backend: Backend = backend
        self.image_channels = image_channels(network) if channels is None else channels
        self.body = prepare(network, backend, input_size, self.image_channels, training=True)
        self.fixed_ranges = False
        self._switches: tuple[bool, bool] | None = None
        self.__dict__["_network"] = network  # its structure; outside the module tree
        self.stage_plan = None  # stages are modules, and a graph has none
        for name in ("model_name", "model_options", "pretrained_cfg"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        self.register_load_state_dict_post_hook(_forget_switches)  # type: ignore[no-untyped-call]  # torch's

    @property
    def wrapped(self) -> nn.Module:
        """The network before it became a graph, after which messages name this one; its weights are not those here."""
        network: nn.Module = self.__dict__["_network"]
        return network

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits ``B x K`` of images ``B x C x H x W``."""
        if dtype_of(self.body) != torch.float32:
            raise ACKDError(
                f"quantisation needs float32 weights and those of the student are {dtype_of(self.body)}; set "
                "trainer.precision to 32-true or bf16-mixed"
            )
        self._set_switches()
        with torch.autocast(image.device.type, enabled=False):
            logits: Tensor = logits_of(self.body(image.float()), name_of(self))
        return logits

    def _set_switches(self) -> None:
        observe = self.training and not self.fixed_ranges
        if self._switches is not None and self._switches[0] == observe and self._switches[1]:
            return
        quantise = observe or self.has_ranges
        if self._switches == (observe, quantise):
            return
        for each in _fake_quantizers(self.body):
            each.enable_observer(observe)
            each.enable_fake_quant(quantise)
        self._switches = (observe, quantise)

    @property
    def has_ranges(self) -> bool:
        """Whether the ranges of all weights and activations were measured."""
        lows = [each.activation_post_process.min_val for each in _fake_quantizers(self.body)]
        return all(low.numel() > 0 and bool(torch.isfinite(low).all()) for low in lows)

    def float_state(self) -> dict[str, Tensor]:
        """Return the float32 weights by their names in the network."""
        return float_state(self.body.state_dict(), self.wrapped)

    def float_network(self) -> nn.Module:
        """Return a copy of the network in float32, with the weights as they are now, in evaluation mode."""
        network = clone(self.wrapped).to(next(self.body.parameters()).device)
        load_tensors(network, self.float_state())
        return network.eval()

    def get_classifier(self) -> list[nn.Module]:
        """Return the parts of the graph that hold the classifiers' weights."""
        return [self.body.get_submodule(name) for name in head_names(self.wrapped)]

    def converted(self) -> Quantized:
        """Return the int8 network with the ranges of the training, as `quantize` returns one.

        Raises:
            ACKDError: If there are no ranges, because the network was not trained.
        """
        if not self.has_ranges:
            raise ACKDError(
                f"{name_of(self)} has no ranges to quantise with, because it was not trained for a step with "
                "student.quantization; train it first"
            )
        graph = copy.deepcopy(self.body).cpu()
        for each in _fake_quantizers(graph):
            # those of the forward pass: what torchao computes from the ranges differs by half a step
            each.calculate_qparams = functools.partial(_qparams, each)
        return Quantized(convert(graph))


def _qparams(quantizer: Any) -> tuple[Tensor, Tensor]:
    return quantizer.scale, quantizer.zero_point


def _forget_switches(module: nn.Module, keys: Any) -> None:
    cast("FakeQuantized", module)._switches = None  # a checkpoint has those of its moment


def float_state(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return the float32 weights in the state of a `FakeQuantized` network's graph.

    Args:
        state: State dict of ``FakeQuantized.body``.
        network: Network of the same structure, which may be on the meta device.
    """
    own = network.state_dict()
    # the counts of batches are not part of the graph, and nothing that is exported reads them
    counts = {key: torch.tensor(0, device="cpu") for key in own if key.endswith("num_batches_tracked")}
    return {key: state[key] if key in state else counts[key] for key in own if key in state or key in counts}


@torch.no_grad()
def quantize(
    network: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    backend: Backend = "xnnpack",
) -> Quantized:
    """Quantise a trained network to int8, with ranges of activations measured on images.

    Convolutions, linear layers and what the backend has besides compute in int8, everything else in float32. Weights
    get a scale for each output channel.

    Args:
        network: Network that maps images to logits; not changed.
        images: Normalised images as in evaluation, ``N x C x H x W``, or batches of them. About 512 training images
            are usual.
        backend: Kernels that the network is for.

    Returns:
        The int8 network, to be exported.

    Raises:
        ACKDError: If there are no images, a library is missing, or the network cannot be written as a graph.
    """
    batches = iter(torch.split(images, 64) if isinstance(images, Tensor) else images)
    first = next(batches, None)
    if first is None or not len(first):
        raise ACKDError(f"there are no images to quantise {name_of(network)} with; give about {CALIBRATION_IMAGES}")
    size = (first.shape[2], first.shape[3])
    graph = prepare(clone(network).cpu(), backend, size, first.shape[1], training=False)
    graph(first.float().cpu())
    for batch in batches:
        graph(batch.float().cpu())
    return Quantized(convert(graph))


def _fake_quantizers(graph: nn.Module) -> list[Any]:
    return [each for each in graph.modules() if hasattr(each, "fake_quant_enabled")]


def ranges_fixed(epoch: int, epochs: int | None) -> bool:
    """Return whether the ranges stay in an epoch of a fine-tuning.

    Args:
        epoch: Number of the epoch, from 0.
        epochs: Number of epochs; None when the fit is not limited by epochs, whose ranges always follow.
    """
    return epochs is not None and epochs > 0 and epoch >= max(1, math.ceil(RANGES_FIXED_AFTER * epochs))
