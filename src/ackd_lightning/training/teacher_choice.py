"""Which teachers a run has: what was given, what the method reads, and which file has the weights and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ackd_lightning.config.files import packaged_names
from ackd_lightning.errors import ACKDError, first_names
from ackd_lightning.methods.base import Method
from ackd_lightning.models.class_map import FEATURES_ONLY
from ackd_lightning.models.freezing import evaluated
from ackd_lightning.models.hub import HF, is_hub_name
from ackd_lightning.models.stated import read_notes, stated_options
from ackd_lightning.models.teacher_base import NoLogitsError
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.models.weight_files import local_file, read_tensors
from ackd_lightning.models.zoo import create_model
from ackd_lightning.plain import as_plain, is_plain
from ackd_lightning.types import Batch

GivenTeacher = str | nn.Module | TeacherConfig


def as_configs(
    given: GivenTeacher | Mapping[str, Any] | Sequence[GivenTeacher | Mapping[str, Any]] | None,
) -> tuple[TeacherConfig, ...]:
    """Return every given teacher as a `TeacherConfig`.

    Args:
        given: Names, networks, configurations or their plain data; one, several, or None.
    """
    if given is None:
        return ()
    every = [given] if isinstance(given, (str, nn.Module, TeacherConfig, Mapping)) else list(given)
    return tuple(
        each
        if isinstance(each, TeacherConfig)
        else TeacherConfig(**each)
        if isinstance(each, Mapping)
        else TeacherConfig(network=each)
        for each in every
    )


def check_features_only(module: Any, data: Any) -> None:
    """Refuse a method that reads the logits of a teacher whose features alone are used, before the first step.

    Args:
        module: Training module whose method is ready for the fit.
        data: Data module, whose ``train_targets`` some methods need; None for loaders alone.

    Raises:
        NoLogitsError: If the method reads logits.
    """
    if module.method.teacher == "own" or not any(each.features_only for each in module.teachers.frozen):
        return
    targets = getattr(data, "train_targets", None)
    target = torch.zeros(2, dtype=torch.int64) if targets is None else torch.as_tensor(targets)[:2]
    index = torch.arange(len(target))
    image = torch.zeros(len(target), *module.data.image_shape, device=module.device)
    with torch.no_grad(), torch.random.fork_rng(), evaluated(module):
        try:
            batch = Batch(image, target.to(module.device), index.to(module.device))
            module.method(module.student(image), module.teachers(image), batch)
        except NoLogitsError:
            raise
        except Exception:
            return  # equal images can be too little for a loss; the first step reports what is wrong with real ones


def chosen(configs: Sequence[TeacherConfig], method: Method) -> Sequence[TeacherConfig]:
    """Return the teachers that a method reads: none for a method without a teacher, whatever is given.

    Args:
        configs: Teachers that were given.
        method: Method to train.

    Raises:
        ACKDError: If the method needs a teacher and there is none, or there are several and it reads one.
    """
    name = type(method).__name__
    if method.teacher == "none":
        return ()
    if not configs:
        raise ACKDError(
            f"method {name} needs a teacher and `teacher` is empty; name a model and its weight file, or pass a network"
        )
    averaged = len(configs) > 1 and method.teacher == "logits"
    if len(configs) > 1 and method.teacher == "output":
        raise ACKDError(
            f"method {name} reads features, which are not averaged, and `teacher` names {len(configs)} networks; name "
            "one of them"
        )
    weighted = next((each.ensemble_weight for each in configs if each.ensemble_weight != 1.0), None)
    if weighted is not None and not averaged:
        raise ACKDError(
            f"ensemble_weight is {weighted} and method {name} does not average several teachers; leave it out"
        )
    if any(each.class_map == FEATURES_ONLY for each in configs) and method.teacher == "logits":
        raise ACKDError(f"class_map is {FEATURES_ONLY} and method {name} reads logits alone; map the teacher's classes")
    return configs


def weight_file(config: TeacherConfig) -> str:
    """Return the path of a teacher's weight file, or say how to make it.

    Args:
        config: Teacher given by name.

    Raises:
        ACKDError: If no file is named or it does not exist.
    """
    if config.weights is None:
        folder = str(config.network).startswith(HF)
        remedy = "the folder's own weights" if folder else "published weights"
        file = "" if folder else "teacher.weights to its .safetensors file, or "
        raise ACKDError(
            f"teacher {config.network!r} has no weight file; set {file}teacher.pretrained to true for {remedy}"
        )
    if is_hub_name(config.weights):
        local_file(config.weights)
    elif not Path(config.weights).is_file():
        name = f"{Path(config.weights).stem}.yaml"
        known = name in packaged_names() or Path(name).is_file()
        remedy = f"train it with `ackd fit --config {name}`" if known else "give the path of an existing file"
        raise ACKDError(f"teacher weights {config.weights} do not exist; {remedy}")
    return config.weights


def file_metadata(config: TeacherConfig) -> dict[str, str]:
    """Return the metadata of a teacher's weight file, as far as they can be read without its tensors.

    Args:
        config: Teacher given by name.
    """
    return {} if config.weights is None else read_notes(config.weights)


def network_options(config: TeacherConfig) -> dict[str, Any]:
    """Return the options with which a named teacher is built: those given, and those in its weight file.

    Args:
        config: Teacher given by name.
    """
    return stated_options(str(config.network), config.weights, config.options)


def on_meta(name: str, num_classes: int, options: dict[str, Any] | None) -> nn.Module:
    """Build a network without memory for its weights.

    Args:
        name: Name for `create_model`.
        num_classes: Number K of classes.
        options: Options for `create_model`.
    """
    try:
        with torch.device("meta"):
            return create_model(name, num_classes, **(options or {}))
    except (NotImplementedError, RuntimeError):  # a constructor that reads values of tensors, such as RegNet's
        return create_model(name, num_classes, **(options or {})).to("meta")


def classes_in_file(name: str, weights: str, options: dict[str, Any] | None, num_classes: int) -> int:
    """Find the number of classes of a weight file: the length of the tensors whose shape depends on it.

    Args:
        name: Network of the file, for `create_model`.
        weights: Weight file.
        options: Options for `create_model`.
        num_classes: Number that is returned where the file does not tell.

    Raises:
        ACKDError: If the file cannot be read.
    """
    one, two = (on_meta(name, count, options).state_dict() for count in (num_classes, num_classes + 1))
    heads = [key for key in one if one[key].shape != two[key].shape]
    tensors, _ = read_tensors(local_file(weights), quiet=True)
    for key in heads:
        for stored, tensor in tensors.items():
            if (stored == key or stored.endswith(f".{key}")) and tensor.shape[1:] == one[key].shape[1:]:
                return int(tensor.shape[0])
    return num_classes


def compare_classes(first: Sequence[str], second: Sequence[str], owner: str, other: str) -> None:
    """Refuse two lists of class names that are not the same set.

    Args:
        first: Names of the classes.
        second: Other names.
        owner: Whose the first are, for the message.
        other: Whose the second are.

    Raises:
        ACKDError: Naming up to three classes that differ.
    """
    missing, further = sorted(set(first) - set(second)), sorted(set(second) - set(first))
    if missing or further:
        parts = [
            f"{label} has no {first_names(map(repr, names))}"
            for label, names in ((other, missing), (owner, further))
            if names
        ]
        raise ACKDError(
            f"{owner} and {other} have different classes ({'; '.join(parts)}); use data of the same classes, or pass "
            "on_class_mismatch=ignore"
        )


def describe_teachers(configs: Sequence[TeacherConfig]) -> list[dict[str, Any]] | None:
    """Return teachers given by name as plain data for a checkpoint, or None when one is a network or has other options.

    Args:
        configs: The teachers.
    """
    if any(not isinstance(each.network, str) or not is_plain(as_plain(each.options)) for each in configs):
        return None
    return [
        {key: list(each) if isinstance(each, tuple) else each for key, each in vars(config).items()}
        for config in configs
    ]
