"""What a checkpoint and an export say of a training module, and class names that are matched when one is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from ackd_lightning._version import __version__
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.loaders import data_of
from ackd_lightning.data.sources import new_positions
from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.methods.base import FitInfo
from ackd_lightning.models.copies import name_of
from ackd_lightning.models.heads import HeadedNetwork
from ackd_lightning.models.quantization import FakeQuantized
from ackd_lightning.models.start import Start, match_head
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.runs.export import Exported, write_student
from ackd_lightning.training.continuing import (
    describe_optimizers,
    describe_schedules,
    go_on_inside_epoch,
    refuse_inside_epoch,
)
from ackd_lightning.training.labels import Labels, check_unlabelled
from ackd_lightning.training.nonfinite import check_weights
from ackd_lightning.training.optimizers import OpenOptimizers
from ackd_lightning.training.schedule import Recipe
from ackd_lightning.training.teacher_choice import compare_classes
from ackd_lightning.training.teachers import Teachers
from ackd_lightning.types import DataInfo


class SelfDescribing(OpenOptimizers):
    """A module whose checkpoints and exports describe themselves.

    Attributes:
        data: Classes, image size and normalisation of the data.
        teachers: The teachers.
        labelling: Label smoothing and class weights.
        matches_classes: Whether class names must be those of the data.
        seed: Seed of the run.
        start: What the student was started from; None for fresh weights, and after a checkpoint was loaded.
    """

    data: DataInfo
    teachers: Teachers
    labelling: Labels
    matches_classes: bool
    seed: int
    start: Start | None
    _started_from: dict[str, Any] | None = None
    _trained_on: dict[str, Any] | None = None  # what is said of the data of the last fit
    _loaded: Mapping[str, Any] = MappingProxyType({})  # what a checkpoint says of the training of its weights
    _epochs: int | None = None  # of the fit

    @property
    def model_name(self) -> str | None:
        """Name of the student for `create_model`; None for a network that it does not build."""
        name: str | None = getattr(self.student.plain(), "model_name", None)
        return name

    def kept_network(self) -> nn.Module:
        """Return the network that is left after training: the plain student, with the head that the method gives it.

        It computes in float32, also after quantisation-aware training.
        """
        head, plain = self.method.head, self.student.plain()
        if isinstance(plain, FakeQuantized):
            return plain.float_network()
        return plain if head is None else HeadedNetwork(plain, head)

    def save_student(self, path: str | Path, *, overwrite: bool = False) -> Exported:
        """Write the student as a file that describes itself, as ``ackd export`` does.

        Args:
            path: ``.safetensors`` file.
            overwrite: Replace an existing file.

        Raises:
            ACKDError: If the file exists, the student is a network that `create_model` does not build, or the logits
                of the written network differ.
        """
        target, own = Path(path), self.student.plain()
        if self.model_name is None:
            raise ACKDError(
                f"the student is a {type(own).__name__}, which create_model does not build, so {target} could not "
                "describe it; write its weights with save_weights(module.kept_network(), path)"
            )
        if target.exists() and not overwrite:
            raise ACKDError(f"{target} exists; choose another file or pass overwrite=True")
        checkpoint = {
            "ackd_lightning": self.metadata(),
            "state_dict": self.state_dict(),
        }
        return write_student(checkpoint, target)

    # ---------------------------------------------------------------- class names

    def _begin_fit(self) -> None:
        """Tell the method about the fit."""
        data = data_of(self.trainer)
        given = getattr(data, "train_targets", None)
        targets = None if given is None else torch.as_tensor(given)
        check_unlabelled(self.method, targets, data)
        self._trained_on = _facts_of_data(data)
        self.labelling.begin_fit(targets)
        self.method.begin_fit(
            FitInfo(
                epochs=self._epochs,
                batch_size=getattr(data, "batch_size", None),
                targets=targets,
                seed=self.seed,
                teachers=self.teachers.frozen,
            )
        )

    def _take_class_names(self, data: Any) -> None:
        started = self.start
        before = None if started is None else started.class_names
        if (names := getattr(data, "class_names", None)) is not None and len(names):
            own = self.data.class_names if before is None else None
            if own is None or not self._reorder(data, names, own, "the module"):
                self.data = replace(self.data, class_names=names)
        self._match_start()

    def _match_start(self) -> None:
        """Bring the head that the student starts from into the order of the data's classes, where both are known."""
        started, names = self.start, self.data.class_names
        if started is None or started.class_names is None or names is None or not self.matches_classes:
            return
        match_head(self.student.plain(), started.class_names, names, started.origin, self.data.image_shape)
        self.start = replace(started, class_names=None)  # once, and not after a fit

    def match_classes(self, data: Any) -> None:
        """Take the class names of the data, and bring the logits of loaded teachers into their order.

        Args:
            data: Data module after ``setup``; None, or one without ``class_names``, changes nothing.
        """
        self._take_class_names(data)
        self._match_teachers()

    def _match_teachers(self) -> None:
        """Bring the teachers' logits into the order of the data's classes, and say what is done to them."""
        self.teachers.match_classes(
            self.data.class_names, reorder=not self.method.raw_classes, by_name=self.matches_classes
        )
        for sentence in self.teachers.announce():
            rank_zero_only(print)(sentence, flush=True)

    def _match_data(self, names: Sequence[str]) -> None:
        """Bring the data's classes into the order in which a checkpoint was trained; without a Trainer, keep it."""
        if self._trainer is None:
            self.data = replace(self.data, class_names=tuple(names))
            return
        data, own = data_of(self.trainer), self.data.class_names
        if own is None or not self._reorder(data, own, names, "the checkpoint"):
            return
        self._reorder_weights(new_positions(names, own))
        self.data = replace(self.data, class_names=tuple(names))
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._match_teachers()
            self._begin_fit()

    def _reorder_weights(self, positions: Tensor) -> None:
        """Bring listed class weights into another order, also those that a checkpoint will have."""
        weights = self.labelling.weights
        if weights is not None and not self.labelling.automatic:
            self.labelling.weights = weights[positions]
            listed: list[float] = self.labelling.weights.tolist()
            self.recipe = replace(self.recipe, class_weights=listed)
            if "recipe" in self.hparams:
                self.hparams["recipe"] = {**self.hparams["recipe"], "class_weights": listed}

    def _reorder(self, data: Any, found: Sequence[str], names: Sequence[str], origin: str) -> bool:
        """Bring the data's classes from the order in which they are found into another; return whether they differ."""
        if tuple(found) == tuple(names) or not self.matches_classes:
            return False
        compare_classes(names, found, origin, "the data")
        reorder = getattr(data, "use_class_order", None)
        if reorder is None:
            raise ACKDError(
                f"{origin} has the classes of the data in another order and {type(data).__name__} has no method "
                f"`use_class_order`; give the data the order of {origin}, or pass on_class_mismatch='ignore'"
            )
        reorder(names)
        rank_zero_only(print)(f"classes of the data are reordered to those of {origin}", flush=True)
        return True

    # ---------------------------------------------------------------- checkpoint

    def metadata(self) -> dict[str, Any]:
        """Return what an export needs to know, as plain data."""
        # counted from 1 in the first step of an epoch; 0 where this Trainer has trained nothing
        epoch = 0 if self._trainer is None else self.trainer.fit_loop.epoch_progress.current.ready
        whole = 1.0 if self._trainer is None else self.trainer.num_training_batches
        done = whole if self._trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        trained = epoch - 1 + done / whole if epoch and 0 < done < whole < math.inf else epoch
        return {
            "version": __version__,
            "model": self.model_name,
            "model_options": dict(getattr(self.student.plain(), "model_options", {})),
            "num_classes": self.data.num_classes,
            "input_size": self.data.input_size,
            "channels": self.data.image_shape[0],
            "mean": list(self.data.mean) if self.data.mean else None,
            "std": list(self.data.std) if self.data.std else None,
            "class_names": list(self.data.class_names) if self.data.class_names else None,
            **(self._trained_on or _facts_of_data(data_of(self._trainer))),
            "method": type(self.method).__name__,
            "teacher": self._teacher_names(),
            "teacher_sha256": [each.metadata.get("sha256") for each in self.teachers.frozen],
            "teacher_facts": [_facts(each) for each in self.teachers.frozen],
            "teacher_class_maps": [each.class_map for each in self.teachers.configs],
            "teacher_ensemble_weights": [each.ensemble_weight for each in self.teachers.configs],
            "seed": self.seed,
            "epoch": epoch,
            "epochs_trained": round(trained, 4),
            "skipped": self.guard.skipped,
            "head": self._describe_head(),
            "learners": list(self.student.specs),
            "optimizers": describe_optimizers(self._trainer.optimizers) if self._trainer is not None else [],
            "schedules": describe_schedules(self._trainer.lr_scheduler_configs) if self._trainer is not None else [],
            "started_from": self._started_from if self.start is None else self.start.notes,
            "frozen": list(self.student_config.freeze),
            "quantization": self.student_config.quantization,
            **(self._loaded if not epoch else {}),
        }

    def _describe_head(self) -> dict[str, Any] | None:
        """Describe the head that a method gives to the student, and the module whose output it reads."""
        head, plan = self.method.head, self.student.plan
        if head is None:
            return None
        return {**head.description(), **({} if plan is None else {"reads": plan.features[-1]})}

    def _teacher_names(self) -> str | None:
        networks = [each.network for each in self.teachers.configs]
        return ", ".join(each if isinstance(each, str) else name_of(each) for each in networks) or None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an export needs; non-finite weights are not written.

        Raises:
            NonFiniteError: Naming what is not finite.
        """
        self.guard.flush(self)
        state: Mapping[str, Tensor] = checkpoint.get("state_dict", {})
        parameters = (name for name, _ in self.named_parameters())
        check_weights(self, state, {*parameters, *(name for name in state if name.startswith("student."))})
        checkpoint["ackd_lightning"] = self.metadata()
        if isinstance(given := checkpoint.get("hyper_parameters"), dict):  # a sub-class may have saved its own
            own = {key: asdict(each) for key, each in given.items() if isinstance(each, DataInfo | Recipe)}
            checkpoint["hyper_parameters"] = {**given, **own}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of skipped steps, and match the data's classes with the checkpoint's."""
        metadata = checkpoint.get("ackd_lightning", {})
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # as Lightning does after the weights are read, which would be rounded
        self.guard.skipped = metadata.get("skipped", 0)
        self._resumed_optimizers = list(metadata.get("optimizers") or [])
        self._resumed_schedules = list(metadata.get("schedules") or [])
        self._started_from = metadata.get("started_from")
        self._loaded = {
            key: metadata[key] for key in ("epoch", "epochs_trained", "teacher", "teacher_sha256") if key in metadata
        }
        self.start = None  # the checkpoint has other weights, with its own classes
        self._same_teachers(metadata)
        if names := metadata.get("class_names"):
            self._match_data(names)
        data = data_of(self._trainer)
        if isinstance(data, ImageDataModule):
            data.say_changed(metadata.get("images") or {})
        go_on_inside_epoch(checkpoint)
        if getattr(self._trainer, "overfit_batches", 0) and self.trainer.state.fn == TrainerFn.FITTING:
            refuse_inside_epoch(checkpoint)

    def _same_teachers(self, metadata: Mapping[str, Any]) -> None:
        """Refuse to go on with other teachers than those that the first part of a run has learned from."""
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        known: Sequence[str | None] = metadata.get("teacher_sha256") or []
        class_maps: Sequence[Any] = metadata.get("teacher_class_maps") or []
        weights: Sequence[float] = metadata.get("teacher_ensemble_weights") or []
        if class_maps and len(class_maps) != len(self.teachers.configs):
            raise ACKDError(
                f"the checkpoint has learned from {count_of(len(class_maps), 'teacher')} and this run has "
                f"{len(self.teachers.configs)}; give those of its first part, or start a new run from its weights"
            )
        for teacher, facts in zip(self.teachers.frozen, metadata.get("teacher_facts") or [], strict=False):
            for key, now in _facts(teacher).items():
                if facts.get(key, now) != now:
                    there, here = (each[:12] if key == "weights_sha256" else each for each in (facts[key], now))
                    raise ACKDError(
                        f"the checkpoint has learned from a teacher {teacher.name} with {key} {there} and this run has "
                        f"{here}; give the teacher of its first part, or start a new run from its weights"
                    )
        for teacher, before in zip(self.teachers.frozen, known, strict=False):
            now = teacher.metadata.get("sha256")
            if before is not None and now is not None and before != now:
                raise ACKDError(
                    f"the checkpoint has learned from a teacher {teacher.name} with SHA-256 {before[:12]} and the file "
                    f"here has {now[:12]}; give the teacher of its first part, or start a new run from its weights"
                )
        if weights and weights != (ours := [each.ensemble_weight for each in self.teachers.configs]):
            raise ACKDError(
                f"the checkpoint has learned from its teachers with ensemble_weight {weights} and this run has {ours}; "
                "give the earlier ones, or start a new run from its weights"
            )
        for config, map_before in zip(self.teachers.configs, class_maps, strict=False):
            if config.class_map != map_before:
                raise ACKDError(
                    f"the checkpoint has learned from {self._teacher_names()} with another class_map than "
                    f"{str(config.class_map)[:60]}; give the earlier one, or start a new run from its weights"
                )


def _facts_of_data(data: Any) -> dict[str, Any]:
    """Return what a checkpoint says about the data, as plain data."""
    own = isinstance(data, ImageDataModule)
    return {
        "preprocessing": data.preprocessing if own else None,
        "data": type(data).__name__ if data is not None else None,
        "images": data.part_marks if own else None,
    }


def _facts(teacher: FrozenTeacher) -> dict[str, Any]:
    """Return what a teacher's logits depend on beside a weight file."""
    facts = {**teacher.given.plain(), "bf16": teacher.bf16}
    return facts if "sha256" in teacher.metadata else {**facts, "weights_sha256": teacher.fingerprint()}
