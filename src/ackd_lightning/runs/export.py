"""Export networks of a training run: each a plain network in a file that is checked before it gets its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.branches import PEER, is_branch, peer_network
from ackd_lightning.models.copies import image_channels, load_tensors
from ackd_lightning.models.heads import with_head
from ackd_lightning.models.metadata import as_text
from ackd_lightning.models.quantization import float_state
from ackd_lightning.models.weights import (
    STUDENT_PREFIX,
    check_fit,
    load_weights,
    save_weights,
    state_digest,
)
from ackd_lightning.models.zoo import create_model
from ackd_lightning.models.zoo.complexity import count_parameters
from ackd_lightning.runs.files import read_checkpoint
from ackd_lightning.runs.versions import versions
from ackd_lightning.types import ImageSize, height_width
from ackd_lightning.writing import whole_file

KEPT = ("student.", "method.head.")
"""What the names of tensors begin with that are left after training."""
_TOLERANCE, _IMAGES = 1e-5, 4


@dataclass(frozen=True, slots=True)
class Exported:
    """A network that was exported.

    Attributes:
        path: File with its weights.
        largest_difference: Largest absolute difference between the logits of the trained network and of the network
            in the file, on a batch of random images.
        network: Network that was loaded from the file.
        input_size: Side of its images in pixels, or their height and width.
        plain_parameters: Number of parameters of the backbone with its own classifier; the same as those of
            ``network`` unless that has the head of a method.
    """

    path: Path
    largest_difference: float
    network: nn.Module
    input_size: ImageSize
    plain_parameters: int


def peer_name(spec: str, student: str) -> str | None:
    """Return the model name of an auxiliary learner that is a whole network; None for a branch of the student.

    Args:
        spec: Entry of ``BranchyStudent.specs``.
        student: Model name of the student.
    """
    if is_branch(spec):
        return None
    network = peer_network(spec)
    return student if network == PEER else network


@dataclass(frozen=True, slots=True)
class _Source:
    """A network in a checkpoint: how to build it, and its tensors."""

    name: str
    options: dict[str, Any]
    num_classes: int
    head: dict[str, Any] | None
    state: dict[str, Tensor]

    def plain(self) -> nn.Module:
        return create_model(self.name, self.num_classes, **self.options)

    def fresh(self) -> nn.Module:
        return with_head(self.plain(), self.head).eval()


def _source(checkpoint: Mapping[str, Any], path: Path, learner: int) -> _Source:
    """Find the student (learner 0) with its head, or a peer (learners from 1).

    Raises:
        ACKDError: If there is no such learner, or it is a branch and not a network of its own.
    """
    metadata, state = checkpoint["ackd_lightning"], checkpoint["state_dict"]
    name, options = metadata.get("model"), metadata.get("model_options") or {}
    if not isinstance(name, str):
        raise ACKDError(
            f"{path} was trained with a network of your own, not one by name, and its run has no config.yaml by which "
            "it could be built; in Python, save its weights with save_weights(module.kept_network(), path)"
        )

    def below(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}

    classes, specs = metadata["num_classes"], metadata.get("learners") or []
    if learner:
        found = peer_name(specs[learner - 1], name) if 0 < learner <= len(specs) else None
        if found is None:
            peers = [str(number) for number, spec in enumerate(specs, start=1) if peer_name(spec, name)]
            remedy = f"use one of {', '.join(['0', *peers])}" if peers else "it has no peers, so leave it out"
            raise ACKDError(f"--learner is {learner}, which is not a network of its own in {path}; {remedy}")
        usual = {key: value for key, value in options.items() if key == "in_chans"}
        own = options if peer_network(specs[learner - 1]) == PEER else usual
        return _Source(found, own, classes, None, below(f"student.branches.{learner - 1}.network."))
    head, plain = metadata.get("head"), below(STUDENT_PREFIX)
    if metadata.get("quantization") is not None:
        with torch.device("meta"):
            plain = float_state(below(f"{STUDENT_PREFIX}body."), create_model(name, classes, **options))
    if head is None:
        return _Source(name, options, classes, None, plain)
    with torch.device("meta"):
        try:
            whole = create_model(name, classes, **options)
            kept = with_head(whole, head).get_submodule("backbone").state_dict()
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error)[:80]
            raise ACKDError(f"{path} is damaged (its head does not fit: {reason}); choose another one") from error
    useless = whole.state_dict().keys() - kept.keys()
    body = {f"backbone.{key}": value for key, value in plain.items() if key not in useless}
    return _Source(
        name, options, classes, head, {**body, **{f"head.{key}": value for key, value in below("method.head.").items()}}
    )


def describe_network(
    checkpoint: Mapping[str, Any],
    name: str,
    options: Mapping[str, Any],
    head: Mapping[str, Any] | None,
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return what an exported file says of its network: everything that a later run with it as a teacher needs.

    Args:
        checkpoint: Content of a checkpoint of this package.
        name: Name of the network, or its class.
        options: Options that it is built with.
        head: Head of a method that replaces the classifier; None without one.
        extra: Further metadata.
    """
    metadata = checkpoint["ackd_lightning"]
    values = {
        "channels": metadata.get("channels"),
        **(metadata.get("preprocessing") or {}),
        "model": name,
        "model_options": options or None,
        "head": head,
        "num_classes": metadata["num_classes"],
        "class_names": metadata.get("class_names"),
        "input_size": metadata["input_size"],
        "mean": metadata["mean"],
        "std": metadata["std"],
        "data": metadata["data"],
        "method": metadata["method"],
        "teacher": metadata.get("teacher"),
        "started_from": metadata.get("started_from"),
        "frozen": metadata.get("frozen") or None,
        "trained_for_int8": metadata.get("quantization"),
        "seed": metadata["seed"],
        "epochs": metadata.get("epochs_trained", metadata["epoch"]),
        "versions": versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "dtype": "float32",
    }
    return {**as_text(values), **(extra or {})}


def network_of(
    checkpoint: Mapping[str, Any],
    origin: Path,
    *,
    learner: int = 0,
    extra: Mapping[str, str] | None = None,
) -> tuple[nn.Module, dict[str, str]]:
    """Build a network of a checkpoint, with its weights and in evaluation mode.

    Args:
        checkpoint: Content of a checkpoint of this package.
        origin: Where the content comes from, for messages.
        learner: Number of the learner: 0 for the student, from 1 for a peer.
        extra: Further metadata.

    Returns:
        The network, and its description as text.

    Raises:
        ACKDError: If there is no such learner, or the network is not one that `create_model` builds.
    """
    source = _source(checkpoint, origin, learner)
    with torch.device("meta"):  # before anything of the stated size is allocated
        check_fit(source.state, source.fresh().state_dict(), origin, source.name)
    network = source.fresh()
    load_tensors(network, source.state)
    peer = {"learner": f"{learner}, a peer of the student"} if learner else {}
    return network, describe_network(checkpoint, source.name, source.options, source.head, {**peer, **(extra or {})})


def plain_parameters(checkpoint: Mapping[str, Any], origin: Path, learner: int = 0) -> int:
    """Count the parameters of a network of a checkpoint with its own classifier, whatever head a method gave it.

    Args:
        checkpoint: Content of a checkpoint of this package.
        origin: Where the content comes from, for messages.
        learner: Number of the learner: 0 for the student, from 1 for a peer.
    """
    with torch.device("meta"):
        return count_parameters(_source(checkpoint, origin, learner).plain())


def export_student(
    checkpoint_path: Path,
    target: Path,
    *,
    learner: int = 0,
    extra: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a network of a checkpoint as ``.safetensors``, with the plain network's own keys unless it has a head.

    The file is read back into a fresh network, whose logits are compared with the trained network's on a batch of
    random images; only then does it get its name.

    Args:
        checkpoint_path: Checkpoint of a run.
        target: File to write.
        learner: Number of the learner: 0 for the student, from 1 for a peer.
        extra: Further metadata.
        overwrite: Whether to replace a file that exists.

    Raises:
        ACKDError: If the file exists, the checkpoint was not written by this package, or the logits differ.
    """
    if target.exists() and not overwrite:
        raise _exists(target)
    checkpoint = read_checkpoint(checkpoint_path)
    return write_student(checkpoint, target, origin=checkpoint_path, learner=learner, extra=extra, overwrite=overwrite)


def _exists(target: Path) -> ACKDError:
    return ACKDError(f"{target} exists; choose another --out or pass --overwrite")


def write_student(
    checkpoint: Mapping[str, Any],
    target: Path,
    *,
    origin: Path = Path("this module"),
    learner: int = 0,
    extra: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> Exported:
    """Write a network of a checkpoint in memory; `export_student` says how.

    Args:
        checkpoint: Content of a checkpoint of this package.
        target: File to write.
        origin: Where the content comes from, for messages.
        learner: Number of the learner: 0 for the student, from 1 for a peer.
        extra: Further metadata.
        overwrite: Whether to replace a file that exists.

    Raises:
        ACKDError: If the network is not one that `create_model` builds, or the logits differ.
    """
    stated, source = checkpoint["ackd_lightning"]["input_size"], _source(checkpoint, origin, learner)
    size: ImageSize = stated if isinstance(stated, int) else (stated[0], stated[1])
    trained, metadata = network_of(checkpoint, origin, learner=learner, extra=extra)
    metadata.setdefault("checked", f"logits within {_TOLERANCE:g} of those in training on {_IMAGES} random images")
    try:
        with whole_file(target, replace=overwrite) as partial:
            save_weights(trained, partial, metadata)
            reloaded = source.fresh()
            load_weights(reloaded, partial)
            shape = (image_channels(trained), *height_width(size))
            image = torch.randn(_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                difference = float((trained(image) - reloaded(image)).abs().max())
            if not math.isfinite(difference):
                raise ACKDError(
                    f"the student's logits are not finite, as training diverged; {target} was not written: lower the "
                    "learning rate, or export another checkpoint (--which best)"
                )
            if not difference <= _TOLERANCE:
                raise ACKDError(f"the exported student's logits differ by {difference:.3g}; {target} was not written")
    except FileExistsError as error:  # of another process, since this one looked
        raise _exists(target) from error
    except OSError as error:
        raise ACKDError(
            f"{target} cannot be written ({error.strerror}); choose a folder with room that you may write in"
        ) from error
    return Exported(target, difference, reloaded, size, count_parameters(source.plain()))


def weights_mark(checkpoint: Mapping[str, Any]) -> str:
    """Return a digest of the student's weights, by which a report and an export know that they are about the same.

    Args:
        checkpoint: Content of a checkpoint.
    """
    own = {key: each for key, each in checkpoint["state_dict"].items() if key.startswith(KEPT)}
    return state_digest(own)
