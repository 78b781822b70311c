"""Stages of any network, found in the calls of its modules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from ackd_lightning.models.tracing import Call, Trace, parameters_behind, trace

_SMALLEST_BACKBONE = 16
"""Reduction of the resolution from which on a network's first layers, down to a half, are its stem."""

_PARTS = 4
"""Stages of a network whose resolution is the same everywhere, such as a vision transformer."""


def stage_names(network: nn.Module, traced: Trace, image_size: tuple[int, int]) -> tuple[str, ...]:
    """Return the names of the modules whose outputs are F_0 .. F_K; empty where there are fewer than two.

    A stage ends at the last module, not inside another, before the resolution changes. Blocks of one resolution, as
    those of a vision transformer, are split into four stages. F_0 is the output of what comes before the first stage;
    layers at half of the image's resolution belong to it where the network reduces the resolution 16-fold or more.
    The last feature is the map that global average pooling reads, where there is one.

    Args:
        network: Network that was traced.
        traced: Calls of its modules.
        image_size: Height and width of the image in pixels.
    """
    points = _trunk(traced)
    if not points:
        return ()
    whole = image_size[0] * image_size[1]
    layers = sorted(traced.calls[name].start for name in _weighted(network) if name in traced.calls)
    runs = _runs(points)
    stages: list[Call] = []
    last = 0
    for number in range(len(runs)):
        end = _end(runs, number, last, layers, traced)
        if any(last < start < end.end for start in layers):  # not pooling alone
            stages.append(end)
            last = end.end
    if not stages:
        return ()
    stem: list[Call] = []
    if whole >= _SMALLEST_BACKBONE**2 * _area(stages[-1]):
        stem = [each for each in stages[:-2] if whole <= 4.5 * _area(each)]
        stages = stages[len(stem) :]
    begin = _begin(network, points, stages[0], layers)
    if stem:
        begin = next(start for start in layers if start > stem[-1].end)
    chain = _longest_chain(network, points)
    if len(stages) < 3 and len(chain) >= _PARTS and _holds_most(chain, layers):
        stages = [chain[-(-len(chain) * part // _PARTS) - 1] for part in range(1, _PARTS + 1)]
        begin = chain[0].start
    pooled = [each for each in points if each.name in traced.pooled and each.end >= stages[-1].end]
    if pooled:
        stages[-1] = min((each for each in pooled if each.node is pooled[0].node), key=lambda each: each.depth)
    first = [each for each in points if each.end < begin][-1:]
    names = [each.name for each in first + [each for each in stages if each.end > begin]]
    return tuple(names) if len(names) > 1 else ()


def stage_parts(network: nn.Module, image: Tensor, features: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the modules with weights or statistics and the parameters of each stage, by ``stem``, ``stage1``, ...

    A parameter of a module that is called across stages, or not called as a module, belongs to the first stage whose
    feature depends on it, and to none if only the logits do.

    Args:
        network: Copy of a network in evaluation mode, whose parameters then require gradients.
        image: Example for it.
        features: Names of the modules that return F_0 .. F_K.
    """
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    traced = trace(network, image)
    ends = [traced.calls[name].end for name in features]
    reached = [parameters_behind(network, traced.calls[name].nodes) for name in features]
    names = ["stem", *(f"stage{number}" for number in range(1, len(ends)))]
    parts: dict[str, list[str]] = {name: [] for name in names}

    def place(module: nn.Module, prefix: str) -> None:
        for name, _ in module.named_parameters(prefix.rstrip("."), recurse=False):
            first = next((stage for stage, each in zip(names, reached, strict=True) if name in each), None)
            if first is not None:
                parts[first].append(name)
        for name, child in module.named_children():
            full = f"{prefix}{name}"
            call = traced.calls.get(full)
            number = None if call is None else sum(end < call.end for end in ends)
            if call is None or number is None or (number and call.start < ends[number - 1]):
                place(child, f"{full}.")
            elif number < len(names) and any(True for _ in (*child.parameters(), *child.buffers())):
                parts[names[number]].append(full)

    place(network, "")
    return {name: tuple(each) for name, each in parts.items()}


def _area(call: Call) -> int:
    assert call.shape is not None
    return call.shape[1] * call.shape[2]


def _trunk(traced: Trace) -> list[Call]:
    """Return the points where the network can be cut and has a map, up to global pooling."""
    points = [each for each in traced.spine if each.shape is not None]
    heads = traced.heads if traced.classifier is None else (traced.classifier,)
    if starts := [traced.calls[name].start for name in heads if name in traced.calls]:
        points = [each for each in points if each.end < min(starts)]
    for previous, each in itertools.pairwise(points):
        if _area(each) == 1 and _area(previous) > 4:  # pooled at once, and not halved as on tiny images
            return points[: points.index(each)]
    return points


def _end(runs: Sequence[Sequence[Call]], number: int, last: int, layers: Sequence[int], traced: Trace) -> Call:
    """Return the last module of one resolution that is not the beginning of a block which changes the resolution."""
    run, found = runs[number], runs[number][-1]
    parts = found.name.split(".")
    for size in range(1, len(parts)):
        block = traced.calls.get(".".join(parts[:size]))
        if block is None or block.end < found.end:
            continue
        crossed = sum(each[-1].end < block.end for each in runs[number:])
        own = sum(block.start < start < found.end for start in layers)
        before = [each for each in run if each.end < block.start]
        if crossed == 1 and own <= 1 and before and any(last < start < before[-1].end for start in layers):
            return _end([*runs[:number], before, *runs[number + 1 :]], number, last, layers, traced)
    return found


def _begin(network: nn.Module, points: Sequence[Call], stage: Call, layers: Sequence[int]) -> int:
    """Return where the first stage begins: at the first of its blocks, or else at the second layer of the network."""
    parent, kind = stage.name.rpartition(".")[0], type(network.get_submodule(stage.name))
    begin = min(
        each.start
        for each in points
        if each.name.rpartition(".")[0] == parent and type(network.get_submodule(each.name)) is kind
    )
    has_layers = any(stage.start < start < stage.end for start in layers)
    if (has_layers and any(each.end < begin for each in points)) or len(layers) < 2:
        return begin
    return layers[1]


def _weighted(network: nn.Module) -> list[str]:
    """Return the names of the layers with weights."""
    return [
        name
        for name, module in network.named_modules()
        if any(each.dim() > 1 for each in module.parameters(recurse=False))
    ]


def _longest_chain(network: nn.Module, points: Sequence[Call]) -> list[Call]:
    """Return the largest group of modules of one class, one parent and one resolution."""
    groups: dict[tuple[str, type, int], list[Call]] = {}
    for each in points:
        parent = each.name.rpartition(".")[0]
        module = network.get_submodule(each.name)
        if any(True for _ in module.parameters()):
            groups.setdefault((parent, type(module), _area(each)), []).append(each)
    return max(groups.values(), key=len, default=[])


def _holds_most(chain: Sequence[Call], layers: Sequence[int]) -> bool:
    """Whether more than half of the layers of a network lie in a chain."""
    return 2 * sum(chain[0].start < start < chain[-1].end for start in layers) > len(layers)


def _runs(points: Sequence[Call]) -> list[list[Call]]:
    """Group consecutive points of one resolution; a convolution without padding does not begin another."""
    runs: list[list[Call]] = []
    for each in points:
        if runs and _area(each) > 0.6 * _area(runs[-1][0]):
            runs[-1].append(each)
        else:
            runs.append([each])
    return runs
