"""Graphs of networks with observers or fake quantizers, and their conversion to int8."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.extras import require
from ackd_lightning.models.copies import name_of
from ackd_lightning.models.student_config import Backend
from ackd_lightning.types import ImageSize, height_width

_LARGEST_BATCH = 65535
_aten = torch.ops.aten
_SOURCES: dict[Any, Any] = {
    _aten.conv2d.default: nn.Conv2d,
    _aten.linear.default: nn.Linear,
    **dict.fromkeys((_aten.add.Tensor, _aten.add_.Tensor), operator.add),
    **dict.fromkeys((_aten.mul.Tensor, _aten.mul_.Tensor), operator.mul),
    **dict.fromkeys((_aten.relu.default, _aten.relu_.default), nn.ReLU),
    **dict.fromkeys((_aten.hardtanh.default, _aten.hardtanh_.default), nn.Hardtanh),
    **dict.fromkeys((_aten.hardswish.default, _aten.hardswish_.default), nn.Hardswish),
    **dict.fromkeys((_aten.silu.default, _aten.silu_.default), nn.SiLU),
    _aten.gelu.default: nn.GELU,
    _aten.max_pool2d.default: nn.MaxPool2d,
}
"""Layers that the x86 quantizer looks for, by operator."""


class _FoldedNorm(nn.Module):
    """Weight and bias of a convolution that computes what a convolution and a BatchNorm in evaluation mode compute."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(
        self, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, mean: Tensor, var: Tensor
    ) -> tuple[Tensor, Tensor]:
        factor = torch.rsqrt(var + self.eps)
        if scale is not None:
            factor = factor * scale
        offset = -mean * factor if bias is None else (bias - mean) * factor
        if shift is not None:
            offset = offset + shift
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1)), offset


def prepare(
    network: nn.Module, backend: Backend, input_size: ImageSize, channels: int, *, training: bool
) -> GraphModule:
    """Write a network in evaluation mode as a graph with observers, or with fake quantizers for training.

    Args:
        network: Network that maps images to logits; its tensors are those of the graph.
        backend: Kernels that the network is for.
        input_size: Height and width of the images in pixels.
        channels: Channels of the images.
        training: Whether the graph rounds to int8 in every forward pass, rather than to measure ranges alone.

    Raises:
        ACKDError: If a library is missing, or the network cannot be written as a graph.
    """
    modes = {module: module.training for module in network.modules()}
    image = torch.zeros(2, channels, *height_width(input_size), device=_device(network))
    with _quiet():
        quantizer = _quantizer(backend, training=training)
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        try:
            with torch.no_grad():
                exported = torch.export.export(
                    network.eval(),
                    (image,),
                    dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)},),
                )
            graph = exported.module(check_guards=False)
            _fold_norms(graph)
            prepared: GraphModule = prepare_pt2e(graph, quantizer)
        except ACKDError:
            raise
        except Exception as error:  # whatever the libraries find
            reason = first_line(error)
            raise ACKDError(
                f"{name_of(network)} cannot be quantised for {backend} ({reason}); choose another network"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
    if training:
        _size_ranges(prepared)
    if not _observers(prepared):
        raise ACKDError(
            f"{name_of(network)} has no layer that {backend} computes in int8; choose another network or backend"
        )
    return prepared


def _size_ranges(graph: GraphModule) -> None:
    """Give the ranges of weights their shape now and not in the first step, so that every state dict has it."""
    for node in graph.graph.nodes:
        each = graph.get_submodule(node.target) if node.op == "call_module" else None
        if each is None or not getattr(each, "is_per_channel", False) or not hasattr(each, "fake_quant_enabled"):
            continue
        quantizer: Any = each
        channels = node.args[0].meta["val"].shape[quantizer.ch_axis]
        observer = quantizer.activation_post_process
        for owner, name, value in (
            (quantizer, "scale", 1),
            (quantizer, "zero_point", 0),
            (observer, "min_val", float("inf")),
            (observer, "max_val", float("-inf")),
        ):
            getattr(owner, name).resize_(channels).fill_(value)


def _quantizer(backend: Backend, *, training: bool) -> Any:
    needed_by = f"quantisation for {backend}"
    require("torchao", "quantization", needed_by)
    if backend == "x86":
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        config = x86.get_default_x86_inductor_quantization_config(is_qat=training)
        return x86.X86InductorQuantizer().set_global(_without_norms(config, training=training))
    module = require("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", "executorch", needed_by)
    config = module.get_symmetric_quantization_config(is_per_channel=True, is_qat=training)
    quantizer = module.XNNPACKQuantizer().set_global(_without_norms(config, training=training))
    quantizer.SUPPORTED_PATTERNS = [each for each in quantizer.SUPPORTED_PATTERNS if not each.is_qat]
    return quantizer


@functools.cache
def _weight_quantizer() -> Any:
    """Return a maker of fake quantizers of weights, with the range of the present weights of each channel."""
    from torchao.quantization import pt2e

    class CurrentRange(pt2e.PerChannelMinMaxObserver):  # type: ignore[misc, unused-ignore]
        def forward(self, weight: Tensor) -> Tensor:
            self.min_val.fill_(float("inf"))
            self.max_val.fill_(float("-inf"))
            result: Tensor = super().forward(weight)
            return result

    # 2**-12, the smallest step, is that of the weights in the quantizers of torchao for x86 and of XNNPACK
    return pt2e.FakeQuantize.with_args(observer=CurrentRange, eps=2**-12)


def _without_norms(config: Any, *, training: bool) -> Any:
    """Return a configuration for a graph whose norms are folded, with weights whose zero is 0, as kernels expect.

    The fused fake quantizer that the libraries choose takes another zero for a channel whose weights have one sign.
    """
    if training:
        weight = dataclasses.replace(config.weight, observer_or_fake_quant_ctr=_weight_quantizer())
        config = dataclasses.replace(config, weight=weight)
    return dataclasses.replace(config, is_qat=False)


def _fold_norms(graph: GraphModule) -> None:
    """Replace each BatchNorm after a convolution by weights of the convolution that are computed in the graph."""
    nodes = graph.graph
    start = next(node for node in nodes.nodes if node.op not in ("get_attr", "placeholder"))
    for node in list(nodes.nodes):
        if node.op == "get_attr":
            start.prepend(node)  # tensors of a norm are read before the convolution
    for node in list(nodes.nodes):
        if node.target is not _aten.batch_norm.default:
            continue
        layer = cast("Node", node.args[0])
        if layer.target not in (_aten.conv1d.default, _aten.conv2d.default) or len(layer.users) > 1:
            continue
        _, scale, shift, mean, var, _, _, eps, _ = node.args
        weight, bias = cast("Node", layer.args[1]), layer.args[2] if len(layer.args) > 2 else None
        name = f"folded_{node.name}"
        graph.add_submodule(name, _FoldedNorm(cast("float", eps)))
        with nodes.inserting_before(layer):
            both = nodes.call_module(name, (weight, bias, scale, shift, mean, var))
            folded = [nodes.call_function(operator.getitem, (both, number)) for number in (0, 1)]
        for each, like in zip(folded, (weight, cast("Node", mean)), strict=True):
            each.meta["val"] = like.meta["val"]
        layer.args = (layer.args[0], *folded, *layer.args[3:])
        node.replace_all_uses_with(layer)
        nodes.erase_node(node)
    for node in nodes.nodes:
        if node.op == "call_function":
            # one source for each call: torch's own name the module, which a network may call twice
            node.meta["source_fn_stack"] = [(node.name, _SOURCES.get(node.target, node.target))]
    graph.recompile()


def convert(graph: GraphModule) -> GraphModule:
    """Turn a prepared graph into one with int8 weights.

    Args:
        graph: Result of `prepare` after images went through it; changed.
    """
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(graph.get_submodule(node.target), _FoldedNorm):
            continue
        with torch.no_grad():
            values = graph.get_submodule(node.target)(
                *(None if each is None else tensors[each.target] for each in node.args)
            )
        for user in list(node.users):
            name = f"{node.target}_{('weight', 'bias')[user.args[1]]}"
            graph.register_buffer(name, values[user.args[1]])
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(name)
            constant.meta = dict(user.meta)
            user.replace_all_uses_with(constant)
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    with _quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        result: GraphModule = convert_pt2e(graph)
        read = {node.target for node in result.graph.nodes if node.op == "get_attr"}
        for name, _ in [*result.named_parameters(), *result.named_buffers()]:
            if name not in read:  # float32 weights that were replaced
                owner, _, attribute = name.rpartition(".")
                delattr(result.get_submodule(owner), attribute)
    return result.requires_grad_(False)


def _observers(graph: nn.Module) -> list[nn.Module]:
    return [each for each in graph.modules() if hasattr(each, "calculate_qparams")]


def _device(network: nn.Module) -> torch.device:
    return next((each.device for each in network.parameters()), torch.device("cpu"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch and torchao tell their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.utils._pytree", "torchao")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
