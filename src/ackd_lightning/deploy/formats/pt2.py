"""A graph of ``torch.export`` in a ``.pt2`` file, which torch alone runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.formats.program import LARGEST_BATCH, Opened, graph_of, quiet, unreadable
from ackd_lightning.deploy.formats.pt2_safety import check_archive
from ackd_lightning.errors import ACKDError
from ackd_lightning.extras import require

DESCRIPTION = "description.json"
"""Name of the extra file with the metadata."""


def write(network: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network as a graph; its metadata, with the largest batch, are the extra file ``description.json``.

    Args:
        network: Network in evaluation mode.
        example: Two images as the network reads them.
        path: File to write.
        metadata: Text for the file.

    Raises:
        ACKDError: If torch.export refuses the network.
    """
    graph = graph_of(network, example, "pt2")
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines and folders of this machine
    stated = {**metadata, "batch": json.dumps(LARGEST_BATCH)}
    with quiet(), path.open("wb") as stream:
        torch.export.save(graph, stream, extra_files={DESCRIPTION: json.dumps(stated)})


def open_file(path: Path) -> Opened:
    """Open a file with torch, on the CPU; nothing that it holds is unpickled or evaluated.

    Args:
        path: ``.pt2`` file.

    Raises:
        ACKDError: If torch cannot read it, it holds more than tensors and a graph of known operators, or the library
            of its operators is missing.
    """
    extra = {DESCRIPTION: ""}
    try:
        with quiet():
            if "quantized_decomposed" in check_archive(path):
                require("torchao.quantization.pt2e.quantize_pt2e", "quantization", str(path))  # registers them
            module = torch.export.load(path, extra_files=extra).module()
    except ACKDError:
        raise
    except Exception as error:  # of a damaged file, in any way
        raise unreadable(path, "a graph of torch.export", error) from error
    try:
        metadata = json.loads(extra[DESCRIPTION] or "{}")
    except ValueError as error:
        raise unreadable(path, "a graph of torch.export", error) from error

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        return cast("Tensor", module(images.cpu())).detach()

    return Opened(run, {str(key): str(value) for key, value in metadata.items()})
