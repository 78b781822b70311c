"""What every format shares: the opened file, the graph of a network, and the error when it cannot be exported."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ackd_lightning.errors import ACKDError

LARGEST_BATCH = 1024
"""Largest batch of a graph whose batch is dynamic and bounded."""


class Opened(NamedTuple):
    """A file that can be run.

    Attributes:
        run: Function from images, as the file reads them, to ``B x K`` logits.
        metadata: Text inside the file by name.
        network: Network as a module; None for a format that holds a graph.
    """

    run: Callable[[Tensor], Tensor]
    metadata: dict[str, str]
    network: nn.Module | None = None


Writer = Callable[[nn.Module, Tensor, Path, Mapping[str, str]], None]
"""Function of a network in evaluation mode, two images as it reads them, the file, and text for it."""
Opener = Callable[[Path], Opened]


def unreadable(path: Path, kind: str, error: Exception) -> ACKDError:
    """Return the error for a damaged file.

    Args:
        path: The file.
        kind: Name of the format.
        error: What reading it raised.
    """
    return ACKDError(f"{path} cannot be read as {kind} ({telling_line(error)}); export it again, or correct the path")


def telling_line(error: BaseException) -> str:
    """Return the first line of an error that says something, at most 160 characters long.

    Lines with a place in the code of a library, such as OpenVINO's, come last.

    Args:
        error: Any exception.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = sorted(
        (line.strip() for line in text.splitlines() if line.strip()),
        key=lambda line: line.startswith(("Exception from ", "Check '")),
    )
    return (lines or [type(error).__name__])[0][:160]


def graph_of(network: nn.Module, example: Tensor, kind: str, *, largest: int = LARGEST_BATCH) -> ExportedProgram:
    """Return the graph of a network with a dynamic batch.

    Args:
        network: Network in evaluation mode.
        example: Images as the network reads them, at least two where the batch is dynamic.
        kind: Name of the format in messages.
        largest: Largest batch; 1 for a batch that is fixed.

    Raises:
        ACKDError: If torch.export refuses the network, with the module and the operation.
    """
    shapes = None if largest == 1 else ({0: Dim("batch", min=1, max=largest)},)
    with quiet():
        try:
            return torch.export.export(network, (example,), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # an exporter can fail in any way; this one fixes a batch that len(x) has read
            with contextlib.suppress(Exception):
                return torch.export.export(network, (example,), dynamic_shapes=shapes, strict=True)
            raise refused(kind, network, error) from error


def refused(kind: str, network: nn.Module, error: BaseException) -> ACKDError:
    """Return the error for a network that an exporter refuses, with the operator or the module where it stopped.

    Args:
        kind: Name of the format.
        network: The network.
        error: What the exporter raised.
    """
    text = "\n".join(str(each) for each in _chain(error))
    operator = re.search(r"\b((?:aten|torchvision|prims|torch\.ops)[.:]+\w[\w.:]*)", text)
    where = _module_in(error, network)
    named = [f"operator {operator[1]}"] if operator else []
    named += [f"module {where}"] if where else []
    return ACKDError(
        f"{kind} cannot hold this network ({', '.join([*named, telling_line(error)])}); choose another format, or "
        "replace that part of the network"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _module_in(error: BaseException, network: nn.Module) -> str | None:
    """Find the innermost module of a network whose forward was running when an error was raised."""
    names = {id(module): name for name, module in network.named_modules()}
    kinds = {type(module): name for name, module in network.named_modules() if name}
    found = None
    for each in _chain(error):
        frame = each.__traceback__
        while frame is not None:
            module = frame.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                name = names.get(id(module)) or kinds.get(type(module))
                if name:
                    found = f"{name} ({type(module).__name__})"
                elif module is network:
                    found = type(module).__name__
            frame = frame.tb_next
        if found:
            return found
    return None


@contextlib.contextmanager
def quiet_natively() -> Iterator[None]:
    """Silence also what libraries in C++ write to the standard error stream."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with quiet():
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters print and warn about."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
