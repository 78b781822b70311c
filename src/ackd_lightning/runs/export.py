"""Take the target learner out of a training run: a plain network in a file, checked before it is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning._version import __version__
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.heads import HeadedNetwork, SharedClassifiers, with_head
from ackd_lightning.models.weights import (
    STUDENT_PREFIX,
    check_fit,
    fitting_tensors,
    load_weights,
    read_metadata,
    save_weights,
)
from ackd_lightning.models.zoo import create_model
from ackd_lightning.models.zoo.complexity import count_parameters
from ackd_lightning.runs.files import read_checkpoint


@dataclass(frozen=True, slots=True)
class Exported:
    """A student that was written.

    Attributes:
        path: of the file.
        largest_difference: between logits of the trained network and of the file's, on a random batch.
        network: the reloaded network.
        input_size: side of its images in pixels.
        plain_parameters: of the backbone with its own classifier; those of the network unless it has another head.
    """

    path: Path
    largest_difference: float
    network: nn.Module
    input_size: int
    plain_parameters: int


def peer_name(spec: str, student: str) -> str | None:
    """Model name of an auxiliary learner that is a whole network; None for one that grows out of the student.

    Args:
        spec: as ``BranchyStudent.specs`` has it.
        student: model name of the target learner.
    """
    if re.match(r"D\d", spec):
        return None
    return student if spec == "peer" else spec


@dataclass(frozen=True, slots=True)
class _Kept:
    """A network that can be taken out of a checkpoint: how to build it, and its tensors."""

    name: str
    options: dict[str, Any]
    num_classes: int
    head: dict[str, Any] | None
    state: dict[str, Tensor]

    def plain(self) -> nn.Module:
        return create_model(self.name, self.num_classes, **self.options)

    def fresh(self) -> nn.Module:
        return with_head(self.plain(), self.head).eval()


def _kept(checkpoint: Mapping[str, Any], path: Path, learner: int) -> _Kept:
    """The target learner (0) with its head, or a peer (from 1).

    Raises:
        ACKDError: when there is no such learner, or it is no network of its own.
    """
    facts, hparams, state = (
        checkpoint["ackd_lightning"],
        checkpoint.get("hyper_parameters", {}),
        checkpoint["state_dict"],
    )
    name, options = hparams.get("student"), hparams.get("student_options") or {}
    if not isinstance(name, str):
        raise ACKDError(
            f"{path} was trained with a network of your own, not one by name; in Python, save it with "
            "save_weights(module.kept_network(), path)"
        )

    def below(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}

    classes, specs = facts["num_classes"], facts.get("learners") or []
    if learner:
        found = peer_name(specs[learner - 1], name) if 0 < learner <= len(specs) else None
        if found is None:
            peers = [str(number) for number, spec in enumerate(specs, start=1) if peer_name(spec, name)]
            remedy = f"use one of {', '.join(['0', *peers])}" if peers else "it has no peers, so leave it out"
            raise ACKDError(f"--learner is {learner} and {path} has no such network of its own; {remedy}")
        own = options if specs[learner - 1] == "peer" else {}
        return _Kept(found, own, classes, None, below(f"student.branches.{learner - 1}.network."))
    head, plain = facts.get("head"), below(STUDENT_PREFIX)
    if head is None:
        return _Kept(name, options, classes, None, plain)
    with torch.device("meta"):
        try:
            headed = HeadedNetwork(create_model(name, classes, **options), SharedClassifiers(**head))
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error)[:80]
            raise ACKDError(f"{path} is damaged (its head does not fit: {reason}); choose another one") from error
    own_classifier = f"{headed.plan.classifier}."
    body = {f"backbone.{key}": value for key, value in plain.items() if not key.startswith(own_classifier)}
    whole = {**body, **{f"head.{key}": value for key, value in below("method.head.").items()}}
    return _Kept(name, options, classes, head, whole)


def _plain_metadata(checkpoint: Mapping[str, Any], kept: _Kept, extra: Mapping[str, str] | None) -> dict[str, str]:
    """What a weight file says of itself: everything that a later run with it as a teacher needs."""
    facts = checkpoint["ackd_lightning"]
    values = {
        "model": kept.name,
        "model_options": kept.options or None,
        "head": kept.head,
        "num_classes": facts["num_classes"],
        "input_size": facts["input_size"],
        "mean": facts["mean"],
        "std": facts["std"],
        "data": facts["data"],
        "method": facts["method"],
        "seed": facts["seed"],
        "epochs": facts["epoch"],
        "ackd_lightning": __version__,
        "torch": torch.__version__,
    }
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return {**{key: value for key, value in plain.items() if value != "null"}, **(extra or {})}


def export_student(
    checkpoint_path: Path,
    target: Path,
    *,
    learner: int = 0,
    extra: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a network of a checkpoint as ``.safetensors``: with the plain network's own keys where it has no head.

    The file is read back into a fresh network and its logits are compared with the trained network's on a batch; only
    then does it get its name.

    Args:
        checkpoint_path: of a run.
        target: where it goes.
        learner: 0 for the target learner, from 1 for a peer.
        extra: more metadata.
        overwrite: replace a file that is there.

    Raises:
        ACKDError: when the file exists, the checkpoint is not ours, or logits differ.
    """
    if target.exists() and not overwrite:
        raise ACKDError(f"{target} exists; choose another --out or pass --overwrite")
    checkpoint = read_checkpoint(checkpoint_path)
    facts, kept = checkpoint["ackd_lightning"], _kept(checkpoint, checkpoint_path, learner)
    with torch.device("meta"):  # before anything of the stated size is allocated
        check_fit(kept.state, kept.fresh().state_dict(), checkpoint_path, kept.name)
    trained = kept.fresh()
    trained.load_state_dict(kept.state)
    partial = target.with_name(f".{target.name}.unchecked.safetensors")
    try:
        save_weights(kept.state, partial, _plain_metadata(checkpoint, kept, extra))
    except ACKDError as error:
        raise ACKDError(str(error).replace(str(partial), str(target))) from error
    try:
        reloaded = kept.fresh()
        load_weights(reloaded, partial)
        image = torch.randn(4, 3, facts["input_size"], facts["input_size"], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            difference = float((trained(image) - reloaded(image)).abs().max())
        if not difference <= 1e-5:
            raise ACKDError(f"the exported student's logits differ by {difference:.3g}; {target} was not written")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(target, difference, reloaded, facts["input_size"], count_parameters(kept.plain()))


def load_student(path: str | Path) -> nn.Module:
    """Build the network that a file of ``ackd export`` or of a run describes, with its weights, in evaluation mode.

    Args:
        path: of a ``.safetensors`` file that names its model.

    Raises:
        ACKDError: when the file does not say what it holds, or does not hold it.
    """
    facts = read_metadata(path)
    try:
        name, classes = facts["model"], int(facts["num_classes"])
        options, head = json.loads(facts.get("model_options", "{}")), json.loads(facts.get("head", "null"))
        with torch.device("meta"):  # before anything of the stated size is allocated
            ghost = with_head(create_model(name, classes, **options), head)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        if isinstance(error, ACKDError):
            raise
        raise ACKDError(
            f"{path} does not say which network it holds; build it with create_model and use load_weights"
        ) from error
    tensors, _ = fitting_tensors(ghost, path, name=name)
    network = with_head(create_model(name, classes, **options), head)
    network.load_state_dict(tensors)
    return network.eval()
