"""OpenVINO: an ``.xml`` file with the graph, and a ``.bin`` file beside it with the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.formats.program import Opened, graph_of, quiet, quiet_natively, refused, unreadable
from ackd_lightning.extras import require

PLACE = ["ackd_lightning", "description"]
"""Entry of the graph's ``rt_info`` with the metadata as JSON."""


def write(network: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network for OpenVINO; its metadata are in ``rt_info``, and its weights in a ``.bin`` file beside it.

    Args:
        network: Network in evaluation mode.
        example: Two images as the network reads them.
        path: ``.xml`` file to write.
        metadata: Text for the file.

    Raises:
        ACKDError: If OpenVINO is missing, or refuses the network.
    """
    openvino = _library("format openvino")
    graph = graph_of(network, example, "openvino")
    try:
        with quiet():
            model = openvino.convert_model(graph)
            model.reshape([-1, *example.shape[1:]])  # else images of any size and number of channels are taken
    except Exception as error:  # an exporter can fail in any way
        raise refused("openvino", network, error) from error
    model.set_rt_info(json.dumps(dict(metadata)), PLACE)
    openvino.save_model(model, path, compress_to_fp16=False)


def open_file(path: Path) -> Opened:
    """Open a file with OpenVINO, on the CPU.

    Args:
        path: ``.xml`` file.

    Raises:
        ACKDError: If OpenVINO is missing or cannot read the file.
    """
    openvino = _library(str(path))
    try:
        core = openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        with quiet_natively():  # what is not XML is tried as other formats, aloud
            model = core.read_model(path)
        metadata = json.loads(model.get_rt_info(PLACE).astype(str)) if model.has_rt_info(PLACE) else {}
        compiled = core.compile_model(model, "CPU", settings)
    except Exception as error:  # of a damaged file, in any way
        raise unreadable(path, "a graph of OpenVINO", error) from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled(images.cpu().contiguous().numpy())[0].copy())

    return Opened(run, {str(key): str(value) for key, value in metadata.items()})


def _library(needed_by: str) -> Any:
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    return require("openvino", "openvino", needed_by)
