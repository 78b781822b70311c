"""The student of a run and the data that its files are compared on, for the commands that write or send files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ackd_lightning.callbacks.accuracy_table import validates_in_part
from ackd_lightning.data.base import ImageDataModule, info_of
from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.files import ExportedNetwork, of_module, open_network
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import in_our_words
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.preflight import check_checkpoint
from ackd_lightning.launch.run_data import data_of_run
from ackd_lightning.models.copies import load_tensors
from ackd_lightning.models.heads import LogitsAlone
from ackd_lightning.models.hub import is_hub_name
from ackd_lightning.models.quantization import FakeQuantized
from ackd_lightning.models.zoo.complexity import count_parameters
from ackd_lightning.runs.claim import say_unfinished
from ackd_lightning.runs.export import KEPT, describe_network, network_of, plain_parameters
from ackd_lightning.runs.files import Which, find_checkpoint, read_checkpoint, read_summary, run_folder
from ackd_lightning.types import height_width


class Student(NamedTuple):
    """Student of a run.

    Attributes:
        checkpoint: Checkpoint.
        content: Content of the checkpoint.
        network: Network in evaluation mode.
        description: What it is.
        summary: Summary of the run; empty without one.
        plain_parameters: Number of its parameters without the head of a method.
        own: Whether it is a class of the user's own, which a file of weights cannot rebuild.
    """

    checkpoint: Path
    content: dict[str, Any]
    network: nn.Module
    description: Description
    summary: dict[str, Any]
    plain_parameters: int
    own: bool = False


def chosen_device(name: str) -> torch.device:
    """Return the device of an option ``--device``.

    Args:
        name: ``auto`` for a GPU where there is one, ``cuda`` or ``cpu``.

    Raises:
        ACKDError: If it is cuda, and torch finds none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ACKDError("--device is cuda and torch finds no CUDA device here; leave it out")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def read_student(run: str, which: Which, learner: int = 0) -> Student:
    """Build the student, or a peer, of a run.

    Args:
        run: Run folder or checkpoint.
        which: Checkpoint of a run folder.
        learner: Number of the learner: 0 for the student, from 1 for a peer.
    """
    checkpoint = find_checkpoint(run, which)
    folder, content = run_folder(checkpoint), read_checkpoint(checkpoint)
    say_unfinished(checkpoint)
    summary = read_summary(folder) if (folder / "summary.json").is_file() else {}
    known = {} if content["ackd_lightning"].get("quantization") else _accuracies(summary, checkpoint.stem, learner)
    metadata = {**known, "weights": f"{checkpoint.stem} epoch"}  # a student in training for int8 was measured in int8
    own = content["ackd_lightning"].get("model") is None and (folder / "config.yaml").is_file()
    if own and learner:
        raise ACKDError(f"--learner is {learner} and the student of {folder} is a network of your own; leave it out")
    if own:
        network, stated, size = _own_network(checkpoint, content, metadata)
    else:
        network, stated = network_of(content, checkpoint, learner=learner, extra=metadata)
        size = plain_parameters(content, checkpoint, learner)
    description = Description.from_metadata(stated, str(checkpoint))
    return Student(checkpoint, content, network, description, summary, size, own)


def trained(checkpoint: Path, content: dict[str, Any], settings: Sequence[str] = ()) -> ACKDCLI:
    """Build the data module and the training module of a run, the latter with the weights of a checkpoint.

    Student, auxiliary learners and head are loaded, without what only training needs.

    Args:
        checkpoint: Checkpoint, whose run has a ``config.yaml``.
        content: Content of the checkpoint.
        settings: Settings of `ackd test` that change those of the run.

    Raises:
        ACKDError: If the settings and the checkpoint do not belong together.
    """
    cli = ACKDCLI("test", [str(checkpoint), *settings])
    cli.build()
    check_checkpoint(checkpoint, cli.model, content)
    cli.model.on_load_checkpoint(content)
    state = {key: each for key, each in content["state_dict"].items() if key.startswith(KEPT)}
    missing, _ = load_tensors(cli.model, state, strict=False)
    if lacking := [key for key in missing if key.startswith(KEPT)]:
        raise ACKDError(f"the checkpoint lacks {lacking[0]}; name another run")
    cli.model.eval()
    return cli


def _own_network(
    checkpoint: Path, content: dict[str, Any], extra: Mapping[str, str]
) -> tuple[nn.Module, dict[str, str], int]:
    """Build a student that is a class of the user's own, its metadata, and count its parameters without a head."""
    with in_our_words():
        module = trained(checkpoint, content).model
    network, plain = LogitsAlone(module.kept_network()).eval(), module.student.plain()
    if isinstance(plain, FakeQuantized):
        plain = plain.float_network()
    name = f"{type(plain).__module__}.{type(plain).__qualname__}"
    stated = describe_network(content, name, {}, content["ackd_lightning"].get("head"), extra)
    return network, stated, count_parameters(plain)


def open_any(run: str, *, which: Which = "last", device: str | torch.device = "cpu") -> ExportedNetwork:
    """Open an exported file, or the student of a run.

    Args:
        run: File, run folder, checkpoint, or ``hf:USER/NAME`` on the hub.
        which: Checkpoint of a run folder.
        device: Device for weights of safetensors and checkpoints; other formats run on the CPU.
    """
    path = Path(run)
    if is_hub_name(run) or not (path.is_dir() or path.suffix == ".ckpt"):
        return open_network(run, which=which, device=device)
    student = read_student(run, which)
    return of_module(student.checkpoint, student.description, student.network, "checkpoint", device)


def _accuracies(summary: dict[str, Any], which: str, learner: int) -> dict[str, str]:
    """Accuracies of a run's summary, with the number of images where it is known; none on a part of the images."""
    ending = f"/aux{learner}_acc" if learner else "/acc"
    found: dict[str, str] = {}
    trained = summary.get(which) or {} if which != "last" or summary.get("last_is_final") else {}
    if validates_in_part(summary):
        trained = {}
    for values in (trained, (summary.get("test") or {}).get(which) or {}):
        for key, value in values.items():
            if key.endswith(ending):
                part = key.partition("/")[0]
                found[f"{part}_acc"] = f"{value:.6f}"
                if count := (summary.get("images") or {}).get(part):
                    found[f"{part}_count"] = str(count)
    return found


def check_data(checkpoint: Path, description: Description, options: Sequence[str]) -> Any:
    """Return the data of a run, whose images files are compared on.

    Args:
        checkpoint: Checkpoint of the run.
        description: What its network expects.
        options: Options of the run's data, such as ``--data.root``.

    Raises:
        ACKDError: If the data are not there, or prepare images otherwise than in training.
    """
    try:
        data = data_of_run(checkpoint, options, description.class_names)
        _refuse_other_images(data, description)
        return data
    except ACKDError as error:
        if options:
            raise
        raise ACKDError(
            f"files are compared on images of the run's data, which are not usable ({error}); give their place with "
            "--data.root FOLDER, or compare on random images alone with --check random"
        ) from error


def reading(data: ImageDataModule, description: Description) -> dict[str, tuple[Any, Any]]:
    """Return how data read an image before it is normalised, each setting as it is here and as a file states it.

    Args:
        data: Data.
        description: What the file of a network states.
    """
    here = {key: tuple(each) if isinstance(each, list) else each for key, each in data.preprocessing.items()}
    names = ("channels", "value_range", "background", "pixels")
    return {name: (here[name], getattr(description, name)) for name in names}


def _refuse_other_images(data: Any, description: Description) -> None:
    """Refuse data that prepare images otherwise than in training, since a file states how it was in training."""
    info = info_of(data)
    both: dict[str, tuple[Any, Any]] = {
        "image size": (height_width(info.input_size), height_width(description.input_size))
    }
    if info.mean is not None and description.mean is not None:
        both |= {"mean": (info.mean, description.mean), "std": (info.std, description.std)}
    if isinstance(data, ImageDataModule):
        both |= reading(data, description)
    for name, (here, there) in both.items():
        if here != there:
            raise ACKDError(
                f"{name} of the data is {here} and was {there} when the student was trained, which its file states; "
                "leave out the option that changes it"
            )
