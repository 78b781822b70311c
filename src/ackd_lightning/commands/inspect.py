"""``ackd inspect``: stages, branch points, size and cost of a network; the description of a file or a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ackd_lightning.commands.student import open_any
from ackd_lightning.deploy.files import ENDINGS
from ackd_lightning.deploy.formats.formats import file_size
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.arguments import option_pairs, read_value
from ackd_lightning.models.branches import branch_names, default_branches
from ackd_lightning.models.copies import image_channels, name_of
from ackd_lightning.models.finding import native_sizes, plan_for, probe, traced, use_taps
from ackd_lightning.models.heads import with_head
from ackd_lightning.models.hub import HF, is_hub_name
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.zoo import count_parameters, create_model, multiply_adds
from ackd_lightning.types import ImageSize, height_width


def read_size(text: str) -> ImageSize:
    """Read an image size from the command line.

    Args:
        text: ``96``, or height and width as ``96x128``.

    Raises:
        ACKDError: If it is neither.

    Examples:
        >>> read_size("96"), read_size("96x128")
        (96, (96, 128))
    """
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ACKDError(f"--size is {text!r}; give a side in pixels such as 96, or height and width as 96x128")
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def read_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Read the options of a network from a command line.

    Args:
        arguments: ``--options.NAME VALUE`` or ``--options.NAME=VALUE``, any number of times.

    Raises:
        ACKDError: If something else stands there, or a value is missing.

    Examples:
        >>> read_options(["--options.img_size", "64", "--options.drop_rate=1e-1"])
        {'img_size': 64, 'drop_rate': 0.1}
    """
    options = {}
    for name, value in option_pairs(arguments):
        if not name.startswith("--options.") or value is None:
            fault = "needs a value" if name.startswith("--options.") else "is unknown to `ackd inspect`"
            raise ACKDError(
                f"{name} {fault}; options of a network are written as --options.NAME VALUE, and "
                "`ackd inspect --help` lists the others"
            )
        options[name.removeprefix("--options.")] = read_value(value)
    return options


def inspect(
    network: str,
    *,
    size: str | None = None,
    classes: int | None = None,
    taps: str = "",
    options: Sequence[str] = (),
) -> None:
    """Print what an exported file or a run is, or the stages of a network by name.

    Args:
        network: Exported file, run folder, checkpoint, ``hf:USER/NAME`` on the hub, or name for `create_model`;
            ``hf:FOLDER`` of a folder that exists is a network.
        size: Image size of a network by name, ``96`` or ``96x128``; None for the size that it was designed for.
        classes: Number of classes of a network by name; None for 1000.
        taps: Names of modules of a network by name whose outputs are taken as stages, separated by commas; default:
            found in the network.
        options: Options of a network by name as a command line, ``--options.img_size 64``.

    Raises:
        ACKDError: If there is no such file, run or network, or it cannot read images of this size.
    """
    chosen = read_options(options)
    path = Path(network)
    remote = is_hub_name(network) and not Path(network.removeprefix(HF)).expanduser().is_dir()
    is_place = path.suffix.lower() in (*ENDINGS, ".ckpt") or path.is_file() or (path / "checkpoints").is_dir()
    if not remote and not is_place:
        return _stages(network, size=size, classes=1000 if classes is None else classes, taps=taps, options=chosen)
    given = {"--size": size, "--classes": classes, "--taps": taps or None, "--options": chosen or None}
    if wrong := next((name for name, value in given.items() if value is not None), None):
        raise ACKDError(f"{wrong} is given and {network} states its own; leave it out")
    return _describe(network)


def _describe(path: str) -> None:
    """Print what a file or a run states, and its size."""
    opened = open_any(path)
    description = opened.description
    print(f"{opened.path}: {opened.kind}, {file_size(opened.path) / 1e6:.2f} MB")
    print("\n".join(description.lines()))
    model = opened.network
    if model is None:  # a graph
        try:
            with torch.device("meta"):
                model = create_model(description.model, description.num_classes, **description.options)
                model = with_head(model, description.head)
        except ACKDError:
            print(f"cost: not known, as {description.model} is a network of your own")
            return
    cost = multiply_adds(model, description.input_size, description.channels)
    print(f"cost: {count_parameters(model):,} parameters, {cost / 1e6:,.1f} million multiply-adds")


def _stages(network: str, *, size: str | None, classes: int, taps: str, options: dict[str, Any]) -> None:
    """Print the stages of a network, where auxiliary learners can branch off, and what all of them cost.

    Every branch is run with the network's weights: its logits must be the network's.

    Args:
        network: Name for `create_model`.
        size: Image size, ``96`` or ``96x128``; None for the size that the network was designed for.
        classes: Number of classes.
        taps: Names of modules whose outputs are taken as stages, separated by commas, in brackets or without; default:
            found in the network.
        options: Options of the network.

    Raises:
        ACKDError: If there is no such network, or it cannot read images of this size.
    """
    model = create_model(network, classes, **options)
    if taps:
        use_taps(model, [part.strip() for part in taps.strip("[]").split(",") if part.strip()], name_of(model))
    if size is None:
        sizes = native_sizes(model)
        pixels: ImageSize = next((each for each in sizes if traced(model, each) is not None), 224)
    else:
        pixels = read_size(size)
    spec, plan, channels = probe(model, pixels), plan_for(model, pixels), image_channels(model)
    height, width = height_width(pixels)
    cost = multiply_adds(model, pixels, channels)
    print(f"{network}: {channels} x {height} x {width} images, {classes:,} classes")
    print(f"{count_parameters(model):,} parameters, {cost / 1e6:,.1f} million multiply-adds")
    if plan is None or spec.features is None:
        print("no stages were found: methods that compare logits work, others need `taps`; peers instead of branches")
        return
    rows: list[tuple[str, ...]] = [("", "module", "C x H x W", "branch", "parameters", "multiply-adds")]
    names = dict(enumerate(reversed(branch_names(plan))))  # by the feature that the branch reads
    notes = []
    for number, (module, shape) in enumerate(zip(plan.features, spec.features, strict=True)):
        row: tuple[str, ...] = (f"F_{number}", module, " x ".join(map(str, shape)))
        if number not in names:
            rows.append((*row, "", "", ""))
            continue
        try:
            with torch.random.fork_rng(devices=[]):
                student = BranchyStudent(model, [names[number]], input_size=pixels)
        except ACKDError as error:
            notes.append(str(error))
            rows.append((*row, "none", "", ""))
            continue
        extra = multiply_adds(student, pixels, channels) - cost
        rows.append((*row, names[number], f"{count_parameters(student.branches):,}", f"{extra / 1e6:,.1f} million"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(w) if place > 3 else cell.ljust(w)
            for place, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    read = "the mean of the last feature" if plan.pooled else f"embedding of {spec.embedding:,} numbers"
    print(f"classifier: {plan.classifier or 'not found'} ({read})")
    print(f"auxiliary learners by default: {', '.join(default_branches(plan))}", *notes, sep="\n")
