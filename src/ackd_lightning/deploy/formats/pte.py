"""ExecuTorch: a program for phones and small computers, lowered to XNNPACK."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.formats.program import Opened, graph_of, quiet_natively, refused, unreadable
from ackd_lightning.extras import require

LARGEST_BATCH = 32
"""Largest batch, for which memory for the images is planned."""
DESCRIPTION = "description"
"""Name of the constant method that returns the metadata."""


def write(network: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a network as a program for XNNPACK; its constant method ``description`` returns its metadata as JSON.

    The size of the images is fixed, and the batch is 1 to 32. With some networks ExecuTorch fixes the batch of the
    example, too; theirs is 1, as a device has one image at a time. The metadata get the largest batch.

    Args:
        network: Network in evaluation mode.
        example: Images as the network reads them.
        path: File to write.
        metadata: Text for the file.

    Raises:
        ACKDError: If ExecuTorch is missing, or refuses the network.
    """
    with quiet_natively():
        exir = _library("executorch.exir", "format pte")
        partitioner = _library("executorch.backends.xnnpack.partition.xnnpack_partitioner", "format pte")
        passes = _library("executorch.exir.passes.sym_shape_eval_pass", "format pte")
    for largest in (LARGEST_BATCH, 1):
        # the bounds of the batch are narrowed to those for which torch would take the same path as with the example
        images = example[:1].repeat(largest, 1, 1, 1)
        graph = graph_of(network, images, "pte", largest=largest)
        try:
            with quiet_natively():
                lowered = exir.to_edge_transform_and_lower(
                    graph,
                    partitioner=[partitioner.XnnpackPartitioner()],
                    constant_methods={DESCRIPTION: json.dumps({**metadata, "batch": json.dumps(largest)})},
                )
                config = exir.ExecutorchBackendConfig(sym_shape_eval_pass=passes.ConstraintBasedSymShapeEvalPass())
                content = lowered.to_executorch(config).buffer
        except Exception as error:  # an exporter can fail in any way
            raise refused("pte", network, error) from error
        path.write_bytes(content)
        if _takes(path, images):
            return


def _takes(path: Path, images: Tensor) -> bool:
    """Return whether a program takes one image, an odd number of images, and all of them."""
    with quiet_natively():
        forward = _library("executorch.runtime", str(path)).Runtime.get().load_program(path).load_method("forward")
        if forward.metadata.input_tensor_meta(0).sizes()[0] != len(images):
            return False
        try:
            for count in (1, 3, len(images)):
                forward.execute([images[:count].contiguous()])
        except RuntimeError:
            return False
    return True


def open_file(path: Path) -> Opened:
    """Open a file with ExecuTorch's Python runtime, on the CPU.

    Args:
        path: ``.pte`` file.

    Raises:
        ACKDError: If ExecuTorch is missing or cannot read the file.
    """
    with quiet_natively():
        runtime = _library("executorch.runtime", str(path))
    try:
        with quiet_natively():
            program = runtime.Runtime.get().load_program(path)
            forward = program.load_method("forward")
            known = DESCRIPTION in program.method_names
            text = program.load_method(DESCRIPTION).execute([])[0] if known else "{}"
            metadata: dict[str, Any] = json.loads(text)
    except Exception as error:  # of a damaged file, in any way
        raise unreadable(path, "a program of ExecuTorch", error) from error
    most = forward.metadata.input_tensor_meta(0).sizes()[0]

    def run(images: Tensor) -> Tensor:
        starts = range(0, len(images), most)
        return torch.cat(
            [forward.execute([images[start : start + most].cpu().contiguous()])[0].clone() for start in starts]
        )

    return Opened(run, {str(key): str(value) for key, value in metadata.items()})


def _library(module: str, needed_by: str) -> Any:
    return require(module, "executorch", needed_by)
