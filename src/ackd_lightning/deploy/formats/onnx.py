"""ONNX, written by torch's exporter with a dynamic batch and run by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.formats.program import Opened, graph_of, quiet, refused, unreadable
from ackd_lightning.extras import require


def write(network: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network as ONNX; its input is ``images``, its output ``logits``, its metadata ``metadata_props``.

    Args:
        network: Network in evaluation mode.
        example: Two images as the network reads them.
        path: File to write.
        metadata: Text for the file.

    Raises:
        ACKDError: If a library is missing, or the exporter refuses the network.
    """
    graph = graph_of(network, example, "onnx")
    try:
        with quiet():
            program: Any = torch.onnx.export(
                graph, dynamo=True, input_names=["images"], output_names=["logits"], external_data=False, verbose=False
            )
            program.model.metadata_props.update(metadata)
            program.save(str(path), external_data=False)
    except OSError:
        raise
    except Exception as error:  # an exporter can fail in any way
        raise refused("onnx", network, error) from error


def open_file(path: Path) -> Opened:
    """Open a file with onnxruntime, on the CPU.

    Args:
        path: ``.onnx`` file.

    Raises:
        ACKDError: If onnxruntime is missing or cannot read the file.
    """
    runtime = require("onnxruntime", "onnx", str(path))
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a damaged file, in any way
        raise unreadable(path, "ONNX", error) from error
    (name,) = (each.name for each in session.get_inputs()[:1])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.cpu().contiguous().numpy()})[0])

    return Opened(run, dict(session.get_modelmeta().custom_metadata_map))
