"""What a report is about: the networks of a run, or an exported file, each as a function from images to logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ackd_lightning.deploy.files import ENDINGS, ExportedNetwork, open_network
from ackd_lightning.deploy.formats.formats import file_size
from ackd_lightning.deploy.report.cost import Cost, latencies, of_module
from ackd_lightning.deploy.report.gradcam import Source
from ackd_lightning.deploy.report.measuring import STUDENT, TEACHER, Runner
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.copies import image_channels
from ackd_lightning.models.finding import plan_for
from ackd_lightning.models.outputs import logits_of
from ackd_lightning.models.student import Peer
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo.complexity import count_parameters
from ackd_lightning.runs.export import peer_name
from ackd_lightning.runs.files import exports, is_older, read_checkpoint
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.types import DataInfo, height_width


@dataclass
class Subject:
    """Networks of a report.

    Attributes:
        run: Function from normalised images to the logits of every network.
        facts: Model, number of classes, method, teacher and data, for the head of the page.
        labels: How the page calls each network.
        costs: Size and speed of the networks, the student first.
        sources: Networks for Grad-CAM.
        learners: Names of auxiliary learners and their ensemble, with their own parameters.
        notes: What had to be left out, in sentences.
        about: Further lines about the subject by their title.
    """

    run: Runner
    facts: dict[str, Any]
    labels: dict[str, str]
    costs: list[Cost] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    learners: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)


def of_run(
    module: DistillationModule, data: DataInfo, summary: Mapping[str, Any], *, measure_on: Sequence[torch.device]
) -> Subject:
    """Describe the networks of a run.

    Args:
        module: Module with the weights of a checkpoint, and its teachers if they could be loaded.
        data: What the data give.
        summary: Content of the run's ``summary.json``; empty without one.
        measure_on: Devices on which speed is measured, the last of which the networks stay on; empty for none.
    """
    student, shape = module.student, data.image_shape
    teachers = [each for each in module.teachers.frozen if not each.features_only]
    learners = [f"aux{number}" for number in range(1, len(student.specs) + 1)]

    def run(image: Tensor) -> dict[str, Tensor]:
        out = student(image)
        first = module.prediction(out)
        found = {STUDENT: first}
        if teachers:
            found[TEACHER] = module.teachers(image).logits
        scores = [each.logits for each in out.branches]
        found |= dict(zip(learners, scores, strict=True))
        if scores:
            found["ensemble"] = torch.stack([each.float() for each in (first, *scores)]).mean(dim=0)
        return found

    own = module.model_name or type(student.plain()).__name__
    subject = Subject(
        run,
        {
            "model": own,
            "num_classes": data.num_classes,
            "method": type(module.method).__name__,
            "teacher": " and ".join(each.name for each in module.teachers.frozen) or None,
        },
        {STUDENT: f"student {own}", "ensemble": "ensemble of student and auxiliary learners"},
    )
    subject.labels[TEACHER] = f"teacher {' and '.join(each.name for each in teachers)}"
    sizes = summary.get("learner_parameters", [None] * len(learners))
    for name, spec, size in zip(learners, student.specs, sizes, strict=False):
        peer = peer_name(spec, own)
        kind = f"peer {peer}" if peer else f"branch {spec}"
        subject.labels[name] = f"auxiliary learner {name.removeprefix('aux')} ({kind})"
        subject.learners[name] = size
    if learners:
        subject.learners["ensemble"] = None
    kept = module.kept_network()
    subject.costs.append(of_module(f"student {own}", kept, shape))
    _time(subject.costs[-1], kept, shape, measure_on)
    for teacher in module.teachers.frozen:
        subject.costs.append(_of_teacher(teacher, data, measure_on))
    if measure_on:
        module.to(measure_on[-1])
    subject.notes += [
        f"teacher {each.name} has other classes, so only its cost is shown"
        for each in module.teachers.frozen
        if each.features_only
    ]
    _add_sources(subject, module, teachers, learners)
    return subject


def _of_teacher(teacher: FrozenTeacher, data: DataInfo, measure_on: Sequence[torch.device]) -> Cost:
    channels = image_channels(teacher.network)
    shape = (channels, *height_width(teacher.input_size or data.input_size))
    cost = of_module(f"teacher {teacher.name}", teacher.network, shape)
    _time(cost, teacher.network, shape, measure_on)
    return cost


def _time(cost: Cost, network: nn.Module, shape: tuple[int, int, int], devices: Sequence[torch.device]) -> None:
    dtype = next((each.dtype for each in network.parameters() if each.is_floating_point()), torch.float32)
    for device in devices:
        network.to(device)

        def run(image: Tensor) -> Tensor:
            return cast("Tensor", network(image.to(dtype)))

        cost.latency += tuple(latencies(run, shape, device=device))


def _add_sources(
    subject: Subject, module: DistillationModule, teachers: Sequence[FrozenTeacher], learners: Sequence[str]
) -> None:
    """Find the last feature map of each network; those without one are noted."""
    student = module.student

    def add(name: str, owner: nn.Module, network: nn.Module, plan: Any, logits: Callable[[Tensor], Tensor]) -> None:
        try:
            subject.sources.append(Source.of(name, owner, network, plan, logits))
        except ACKDError as error:
            subject.notes.append(str(error))

    for teacher in teachers[:1]:

        def of_teacher(image: Tensor, teacher: FrozenTeacher = teacher) -> Tensor:
            dtype = next(teacher.network.parameters()).dtype
            return teacher.select(logits_of(teacher.network(teacher.conversion(image).to(dtype))).float())

        add(f"teacher {teacher.name}", teacher, teacher.network, teacher.plan, of_teacher)
    first = "target learner" if learners else f"student {subject.facts['model']}"
    add(first, module, student.plain(), student.plan, lambda image: module.prediction(student(image)))
    for number, name in enumerate(learners):
        branch: Any = student.branches[number]
        network = branch.network if isinstance(branch, Peer) else branch.suffix.network

        def of_learner(image: Tensor, number: int = number) -> Tensor:
            return cast("Tensor", student(image).branches[number].logits)

        add(f"auxiliary learner {name.removeprefix('aux')}", module, network, branch.plan, of_learner)


def of_file(network: ExportedNetwork, data: DataInfo, *, measure_on: Sequence[torch.device]) -> Subject:
    """Describe an exported file.

    Args:
        network: File that was opened.
        data: What the data give.
        measure_on: Devices on which speed is measured; empty for none. Files that hold a graph are run on the CPU.

    Raises:
        ACKDError: If the data are not what the network reads.
    """
    description = network.description
    check_data(network, data)
    ask = logits_for(network, data)
    subject = Subject(
        lambda image: {STUDENT: ask(image)},
        {
            "model": description.model,
            "num_classes": description.num_classes,
            "method": description.method,
            "teacher": description.teacher,
            "data": description.data,
        },
        {STUDENT: f"{description.model} ({network.kind})"},
        about={"checked": description.checked or "not stated"},
    )
    shape = description.image_shape
    if network.network is not None:
        cost = of_module(f"student {description.model}", network.network, shape)
        _time(cost, network.network, shape, measure_on)
        module = network.network
        try:
            logits: Callable[[Tensor], Tensor] = lambda image: logits_of(module(image))  # noqa: E731
            plan = plan_for(module, description.input_size)
            subject.sources.append(Source.of(f"student {description.model}", module, module, plan, logits))
        except (ACKDError, AttributeError) as error:
            subject.notes.append(str(error))
    else:
        cost = Cost(f"student {description.model}", latency=_of_graph(network, measure_on))
    cost.bytes = file_size(network.path)
    subject.costs.append(cost)
    return subject


def _of_graph(network: ExportedNetwork, measure_on: Sequence[torch.device]) -> tuple[Any, ...]:
    if not measure_on:
        return ()
    description = network.description
    shape, largest = description.image_shape, description.batch
    return tuple(latencies(network.run, shape, largest=largest, dtype=network.image_dtype))


def check_data(network: ExportedNetwork, data: DataInfo) -> None:
    """Refuse data that a file cannot be measured on.

    Args:
        network: File that was opened.
        data: What the data give.

    Raises:
        ACKDError: Naming what differs.
    """
    description = network.description
    if description.image_shape != data.image_shape:
        ours, theirs = (" x ".join(map(str, each)) for each in (description.image_shape, data.image_shape))
        raise ACKDError(f"{network.path} reads images of {ours} and the data give {theirs}; set the size of the data")
    if description.num_classes != data.num_classes:
        raise ACKDError(
            f"{network.path} has {description.num_classes} classes and the data have {data.num_classes}; name the data "
            "that it was trained on"
        )
    if description.class_names and data.class_names and sorted(description.class_names) != sorted(data.class_names):
        other = next(iter(sorted(set(description.class_names) ^ set(data.class_names))), description.class_names[0])
        raise ACKDError(
            f"{network.path} has other classes than the data, such as {other!r}; name the data it was trained on"
        )


def _refuse_outdated(network: ExportedNetwork, checkpoint: Path, epochs: Any) -> None:
    """Refuse a file that was exported before its checkpoint was trained to the end: by its epochs, else by its date."""
    stated = network.description.origin.get("epochs")
    if stated is None or epochs is None:
        outdated = is_older(network.path, checkpoint)
    else:
        outdated = float(stated) != float(epochs)
    if outdated:
        raise ACKDError("it was exported before the run ended; export it again with --overwrite")


def logits_for(network: ExportedNetwork, data: DataInfo) -> Callable[[Tensor], Tensor]:
    """Return a function from the data's images to the logits of the data's classes in their order.

    Images get the file's own normalisation.

    Args:
        network: File that was opened.
        data: What the data give.
    """
    description = network.description
    same = description.mean is None or (description.mean, description.std) == (data.mean, data.std)
    ours, theirs = data.class_names, description.class_names
    order = [theirs.index(name) for name in ours] if ours and theirs and ours != theirs else None

    def ask(image: Tensor) -> Tensor:
        if not same and data.mean and data.std and description.mean and description.std:
            mean, std, own_mean, own_std = (
                image.new_tensor(each).view(1, -1, 1, 1)
                for each in (data.mean, data.std, description.mean, description.std)
            )
            image = (image * std + mean - own_mean) / own_std
        logits = network.logits(image).to(image.device)
        return logits if order is None else logits[:, order]

    return ask


def exported_files(
    folder: Path, data: DataInfo, *, skip: Path | None = None, timed: bool = True
) -> tuple[list[Cost], dict[str, Callable[[Tensor], Tensor]], list[str]]:
    """Open the exported files in a folder, and measure their speed.

    The speed of ``.safetensors`` is that of the network in memory, and is not measured again.

    Args:
        folder: Folder of a run.
        data: What the data give.
        skip: File that is not listed.
        timed: Whether speed is measured.

    Returns:
        A cost for each file; functions from the data's images to logits; sentences about files that were left out.
    """
    costs, asked, notes, ours = [], {}, [], exports(folder)
    epochs: dict[Path, Any] = {}
    for path in sorted(each for each in folder.iterdir() if each.suffix.lower() in ENDINGS and each.is_file()):
        if skip is not None and path.resolve() == skip.resolve():
            continue
        try:
            network = open_network(path)
            check_data(network, data)
            if path in ours:
                if (checkpoint := ours[path]) not in epochs:
                    epochs[checkpoint] = read_checkpoint(checkpoint)["ackd_lightning"].get("epochs_trained")
                _refuse_outdated(network, checkpoint, epochs[checkpoint])
        except ACKDError as error:
            notes.append(f"{path.name} is left out: {error}")
            continue
        kind = network.description.quantization or network.description.dtype
        cost = Cost(f"{path.name} ({kind})" if kind != "float32" else path.name, bytes=file_size(path))
        cost.parameters = None if network.network is None else count_parameters(network.network)
        if timed and network.network is None:
            cost.latency = _of_graph(network, (torch.device("cpu"),))
        costs.append(cost)
        asked[cost.name] = logits_for(network, data)
    return costs, asked, notes
