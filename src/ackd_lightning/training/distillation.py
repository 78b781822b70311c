"""The loop of every method without opponents: one optimizer, automatic optimisation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ackd_lightning._version import __version__
from ackd_lightning.analysis.cka import LearnerStatistics
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.functional import cross_entropy
from ackd_lightning.keyed import mix
from ackd_lightning.methods.base import AdversarialMethod, Method, describe, from_description
from ackd_lightning.methods.ce import CE
from ackd_lightning.models.branchy import BranchyStudent
from ackd_lightning.models.taps import probe
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.weights import digest
from ackd_lightning.models.zoo import create_model
from ackd_lightning.training.finite import ON_NAN, FiniteGuard, OnNan, batchnorm_statistics, check_weights
from ackd_lightning.training.health import TEACHER_GATES, HealthMonitor, TeacherGate, check_teacher
from ackd_lightning.types import Batch, NetOutput, NetSpec


class DistillationModule(L.LightningModule):
    """Trains a student with a method: plain training, KD, and every method that has no discriminators.

    Batches are ``(image, target)`` or ``(image, target, index)``, images already normalised.

    Args:
        student: name for ``create_model``, or a network.
        num_classes: K.
        method: the distillation method; None: plain training.
        teacher: name, network or ``FrozenTeacher``; None for methods without one.
        teacher_weights: weight file of a teacher given by name.
        student_options: for ``create_model``.
        teacher_options: for ``create_model``.
        input_size: side of the images in pixels.
        mean: per channel, how images were normalised; lets the teacher convert them and is written into exports.
        std: as ``mean``.
        lr: learning rate of SGD.
        momentum: of SGD.
        weight_decay: of SGD.
        milestones: epochs after which the learning rate is multiplied by ``lr_decay``.
        lr_decay: factor at each milestone.
        warmup_epochs: epochs over which the learning rate grows linearly to ``lr``; 0 for none.
        gradient_clip_val: largest norm of the gradient; None: not clipped. (Trainer's own argument works in automatic
            optimisation only.)
        teacher_gate: before the first step the teacher is tested on validation data; ``stop`` ends a run whose
            teacher is near chance or far below what its file says, ``warn`` goes on, ``off`` does not look.
        teacher_bf16: run the teacher in bfloat16.
        on_nan: what a loss that is not finite does: ``stop`` ends the run before such a step reaches a checkpoint,
            ``skip`` leaves the step out and counts it (``train/skipped``).
        seed: of the noise inside the networks (dropout); None: the seed of ``seed_everything``, or
            of ``torch.manual_seed``.

    Raises:
        ACKDError: for names, branches and options that do not fit.
    """

    def __init__(
        self,
        student: str | nn.Module,
        num_classes: int,
        *,
        method: Method | None = None,
        teacher: str | nn.Module | None = None,
        teacher_weights: str | None = None,
        student_options: dict[str, Any] | None = None,
        teacher_options: dict[str, Any] | None = None,
        input_size: int = 32,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        milestones: Sequence[int] = (100, 150),
        lr_decay: float = 0.1,
        warmup_epochs: int = 0,
        gradient_clip_val: float | None = None,
        teacher_gate: str = "stop",
        teacher_bf16: bool = False,
        on_nan: OnNan = "stop",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        modules = {"student": student, "method": method, "teacher": teacher}
        ignore = [name for name, value in modules.items() if isinstance(value, nn.Module)]
        self.save_hyperparameters(ignore=ignore)
        if teacher_gate not in TEACHER_GATES:
            raise ACKDError(f"teacher_gate is {teacher_gate!r}; it must be one of {', '.join(TEACHER_GATES)}")
        if on_nan not in ON_NAN:
            raise ACKDError(f"on_nan is {on_nan!r}; it must be one of {', '.join(ON_NAN)}")
        if teacher is student and isinstance(student, nn.Module):
            raise ACKDError("teacher and student are the same network; a frozen teacher cannot learn, pass a copy")
        if lr <= 0 or momentum < 0 or weight_decay < 0:
            raise ACKDError(
                f"lr {lr}, momentum {momentum}, weight_decay {weight_decay}: lr must be above 0, the others 0 or more"
            )
        if momentum >= 1 or lr_decay <= 0 or warmup_epochs < 0 or any(each < 0 for each in milestones):
            raise ACKDError(
                f"momentum {momentum}, lr_decay {lr_decay}, warmup_epochs {warmup_epochs}, milestones "
                f"{list(milestones)}: momentum must be below 1, lr_decay above 0, the others 0 or more"
            )
        if gradient_clip_val is not None and gradient_clip_val <= 0:
            raise ACKDError(
                f"gradient_clip_val is {gradient_clip_val}; it must be above 0, or left out for no clipping"
            )
        self.num_classes, self.input_size = num_classes, input_size
        self.mean, self.std = (tuple(mean) if mean else None), (tuple(std) if std else None)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.milestones, self.lr_decay, self.warmup_epochs = tuple(milestones), lr_decay, warmup_epochs
        self.clip_norm, self.gate = gradient_clip_val, teacher_gate
        self.guard = FiniteGuard(on_nan)
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) if seed is None else seed

        described: object = method  # a checkpoint hands over what `describe` wrote
        resolved = from_description(described) if isinstance(described, Mapping) else (method or self.default_method())
        self._check_method(resolved)
        backbone = (
            create_model(student, num_classes, **(student_options or {})) if isinstance(student, str) else student
        )
        self.student = BranchyStudent(backbone, resolved.branches)
        self.method: Method = resolved
        self.spec: NetSpec = probe(self.student, input_size)
        if self.spec.num_classes != num_classes:
            raise ACKDError(
                f"the student has {self.spec.num_classes} classes and num_classes is {num_classes}; make them equal"
            )
        self._teacher_bf16, self._teacher_weights = teacher_bf16, teacher_weights
        self._teacher_name = teacher if isinstance(teacher, str) else None
        self._teacher_options = teacher_options or {}
        self.teacher: FrozenTeacher | None
        object.__setattr__(self, "teacher", None)  # outside the module tree
        self.teacher_spec: NetSpec | None = self._teacher_spec(teacher)
        self.method.build(self.spec, self.teacher_spec)
        if "method" not in self.hparams or not isinstance(self.hparams["method"], Mapping):
            self.save_hyperparameters({"method": describe(self.method)})

        count = len(self.spec.branches)
        self.learners = ["", *(f"aux{number}_" for number in range(count)), *(["ensemble_"] if count else [])]
        top = min(5, num_classes)
        self.accuracies = nn.ModuleDict(
            {
                f"{learner}acc{suffix}": MulticlassAccuracy(num_classes, top_k=top_k, average="micro")
                for learner in self.learners
                for suffix, top_k in (("", 1), ("_top5", top))
            }
        )
        # read by torch's DistributedDataParallel
        self._ddp_params_and_buffers_to_ignore = [f"method.{name}" for name in self.method.equal_buffers]
        self.learner_statistics = LearnerStatistics(count, self.spec.branches[0].embedding) if count else None
        self._finish()

    def _finish(self) -> None:
        """Last step of the constructor, for sub-classes that keep its arguments."""

    def default_method(self) -> Method:
        """The method of a module that was given none."""
        return CE()

    def _check_method(self, method: Method) -> None:
        if isinstance(method, AdversarialMethod):
            raise ACKDError(
                f"method {type(method).__name__} has discriminators; train it with AdversarialModule or ACKDModule"
            )

    # ---------------------------------------------------------------- teacher

    def _teacher_spec(self, teacher: str | nn.Module | None) -> NetSpec | None:
        """Shapes of the teacher; a given network is taken over at once, a named one is loaded when a fit begins."""
        if not self.method.needs_teacher:
            return None
        if teacher is None:
            raise ACKDError(
                f"method {type(self.method).__name__} needs a teacher and `teacher` is empty; "
                "name a model and its weight file, or pass a network"
            )
        if isinstance(teacher, str):
            with torch.device("meta"):
                network: nn.Module = create_model(teacher, self.num_classes, **self._teacher_options)
            return probe(network, self.input_size)
        frozen = teacher if isinstance(teacher, FrozenTeacher) else FrozenTeacher(teacher, bf16=self._teacher_bf16)
        self.attach_teacher(frozen)
        spec = probe(frozen.network, frozen.input_size or self.input_size)
        if spec.num_classes != self.num_classes:
            raise ACKDError(
                f"the teacher has {spec.num_classes} classes and num_classes is {self.num_classes}; "
                "choose a teacher of the same classes"
            )
        return spec

    def attach_teacher(self, teacher: FrozenTeacher) -> None:
        """Take a teacher, outside the module tree.

        Args:
            teacher: moved along with this module from now on.
        """
        teacher.adapt_to(self.mean, self.std, self.input_size)
        object.__setattr__(self, "teacher", teacher.to(self.device))

    def load_teacher(self) -> None:
        """Load a teacher given by name; nothing to do when it is there or not needed.

        Raises:
            ACKDError: when its weight file is missing or does not fit.
        """
        if self.teacher is not None or not self.method.needs_teacher or self._teacher_name is None:
            return
        weights = check_teacher(self._teacher_name, self._teacher_weights)
        self.attach_teacher(
            FrozenTeacher.from_name(
                self._teacher_name,
                self.num_classes,
                weights=weights,
                options=self._teacher_options,
                bf16=self._teacher_bf16,
            )
        )
        cast(FrozenTeacher, self.teacher).metadata["sha256"] = digest(weights)

    def _apply(self, fn: Any, recurse: bool = True) -> DistillationModule:
        teacher = self.__dict__.get("teacher")
        if teacher is not None:
            teacher._apply(fn, recurse)
        return cast(DistillationModule, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    # ---------------------------------------------------------------- hooks

    def setup(self, stage: str) -> None:
        """Load the teacher and tell the method batch size and training classes when a fit begins.

        Raises:
            ACKDError: when the method has to know the class of every training image and the data do not tell.
        """
        if stage != "fit":
            return
        self.load_teacher()
        before = self._method_sizes()
        data = getattr(self.trainer, "datamodule", None)
        if (batch_size := getattr(data, "batch_size", None)) is not None:
            self.method.set_batch_size(batch_size)
        if self.method.needs_targets:
            targets = getattr(data, "train_targets", None)
            if targets is None:
                raise ACKDError(
                    f"method {type(self.method).__name__} keeps a row for every training image; give the data module "
                    "an attribute `train_targets`, the class of every image by its index, and batches with that index"
                )
            self.method.set_targets(torch.as_tensor(targets), self.seed)
        if self._method_sizes() != before:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.setup(self.trainer, self, stage)  # it has copied the module as it was before

    def _method_sizes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.method.state_dict().items()}

    def configure_callbacks(self) -> list[L.Callback]:
        """Teacher gate and alarms travel with the module into any Trainer."""
        own: list[L.Callback] = getattr(self._trainer, "callbacks", [])
        watched = any(isinstance(each, HealthMonitor) for each in own)
        callbacks: list[L.Callback] = [HealthMonitor()] if self.spec.branches and not watched else []
        if self.method.needs_teacher and self.gate != "off":
            callbacks.append(TeacherGate(stop=self.gate == "stop"))
        return callbacks

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the networks' own noise by (seed, epoch, batch, rank), so that a resumed run draws the same."""
        self.method.set_epoch(self.current_epoch)  # here and not at an epoch's start, which a resumed run skips
        torch.manual_seed(mix(self.seed, self.current_epoch, batch_idx, self.global_rank))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip by norm, after mixed precision has unscaled."""
        if self.clip_norm is not None:
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    # ---------------------------------------------------------------- steps

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the target learner.

        Args:
            image: ``B x C x H x W``.

        Returns:
            ``B x K``.
        """
        output: NetOutput = self.student(image)
        return output.logits

    def as_batch(self, batch: Any) -> Batch:
        """Read ``(image, target)`` or ``(image, target, index)``.

        Args:
            batch: from any data module.

        Raises:
            ACKDError: when it is neither, or the images have another size than the module was built for.
        """
        if isinstance(batch, Batch):
            result = batch
        elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
            image, target = batch[0], batch[1]
            index = batch[2] if len(batch) == 3 else torch.full_like(target, -1)
            result = Batch(image, target, index)
        else:
            raise ACKDError(f"a batch is {type(batch).__name__}; the data must give (image, target) or add an index")
        if result.image.shape[-1] != self.input_size or result.image.shape[-2] != self.input_size:
            raise ACKDError(
                f"images are {result.image.shape[-2]} x {result.image.shape[-1]} and input_size is {self.input_size}; "
                "set input_size to the side of your images"
            )
        return result

    def outputs(self, batch: Batch) -> tuple[NetOutput, NetOutput | None]:
        """One forward pass of teacher and student.

        Args:
            batch: images.
        """
        teacher = self.teacher(batch.image) if self.teacher is not None else None
        return self.student(batch.image), teacher

    def weighted_loss(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of a method's terms.

        Args:
            terms: unweighted scalars by name.
        """
        weights = self.method.weights()
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    def log_terms(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Batch) -> None:
        """Log the loss and every unweighted term: means over the epoch, the loss of each step besides.

        Args:
            loss: weighted sum.
            terms: unweighted.
            batch: gives the batch size.
        """
        size = batch.image.shape[0]
        values = {"train/loss": loss.detach(), **{f"train/{name}": value.detach() for name, value in terms.items()}}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        self.log("train/loss_step", loss.detach(), prog_bar=True, batch_size=size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of the method on one batch; zero for a batch that is skipped."""
        batch = self.as_batch(batch)
        before = self.statistics_before()
        student, teacher = self.outputs(batch)
        terms = self.method(student, teacher, batch)
        loss = self.weighted_loss(terms)
        if self.skips({**terms, "loss": loss}, before):
            return torch.zeros_like(loss)  # of no backward pass: Lightning refuses None with several processes
        with torch.no_grad():
            self.method.observe(student, teacher, batch)
        self.log_terms(loss, terms, batch)
        return loss

    def statistics_before(self) -> list[tuple[Tensor, Tensor]]:
        """What a forward pass changes and a skipped step must not: BatchNorm's buffers, and copies of them."""
        return batchnorm_statistics(self.student, self.method) if self.guard.on_nan == "skip" else []

    @torch.no_grad()
    def skips(self, values: Mapping[str, Tensor], before: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Judge a step; with ``on_nan="skip"`` say whether it is left out, and take back what it changed.

        Args:
            values: unweighted scalars by name.
            before: as ``statistics_before`` gave it.

        Raises:
            NonFiniteError: with ``on_nan="stop"``, when one of them is not finite.
        """
        if not self.guard.must_skip(self, values):
            return False
        for buffer, copy in before:
            buffer.copy_(copy)
        return True

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass, but for a step that is skipped."""
        if not self.guard.skipping:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Optimizer step, but for a step that is skipped; its loss is known before, then."""
        if self.guard.on_nan == "stop" or optimizer_closure is None:
            return super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        loss = optimizer_closure()
        if not self.guard.skipping:
            super().optimizer_step(epoch, batch_idx, optimizer, lambda: loss)
        return None

    def on_train_epoch_end(self) -> None:
        """Judge the epoch's last step, and log how many were skipped."""
        self.guard.end_epoch(self)
        if self.guard.on_nan == "skip":
            self.log("train/skipped", float(self.guard.skipped))

    def looks_at_test(self) -> bool:
        """True when the data has no validation part, so that the fit's evaluation shows test data."""
        data = getattr(self.trainer, "datamodule", None)
        return isinstance(data, ImageDataModule) and data.val_is_test

    def _evaluate(self, batch: Any, prefix: str) -> None:
        batch = self.as_batch(batch)
        student: NetOutput = self.student(batch.image)
        logits = [student.logits, *(branch.logits for branch in student.branches)]
        if student.branches:
            group = self.method.ensemble(student)
            logits.append(torch.stack(logits[1:]).mean(dim=0) if group is None else group)
        size = batch.image.shape[0]
        for learner, scores in zip(self.learners, logits, strict=True):
            for suffix in ("", "_top5"):
                metric = cast(MulticlassAccuracy, self.accuracies[f"{learner}acc{suffix}"])
                metric.update(scores, batch.target)
                shown = learner == "" and suffix == ""
                self.log(f"{prefix}/{learner}acc{suffix}", metric, on_epoch=True, prog_bar=shown, batch_size=size)
        loss = cross_entropy(student.logits, batch.target)
        self.log(f"{prefix}/loss", loss, on_epoch=True, batch_size=size, sync_dist=True)
        if student.branches and self.learner_statistics is not None:
            self.learner_statistics.update([each.embedding for each in student.branches], logits[1:-1])
            self.log_dict(self.method.statistics(student), on_epoch=True, batch_size=size, sync_dist=True)

    def _log_learners(self) -> None:
        if self.learner_statistics is not None:
            values = self.learner_statistics.compute()
            self.log_dict({f"learners/{name}": value for name, value in values.items()}, sync_dist=True)
            self.learner_statistics.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy of the target learner, each auxiliary learner and the ensemble."""
        self._evaluate(batch, "test" if self.looks_at_test() else "val")

    def on_validation_epoch_end(self) -> None:
        """Log CKA, disagreement and spread of the learners."""
        self._log_learners()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As validation, on test data."""
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log CKA, disagreement and spread of the learners."""
        self._log_learners()

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Class, its probability, target and index of every image.

        Returns:
            Four tensors of length B.
        """
        batch = self.as_batch(batch)
        probability, prediction = self(batch.image).float().softmax(dim=1).max(dim=1)
        return {"index": batch.index, "target": batch.target, "prediction": prediction, "probability": probability}

    # ---------------------------------------------------------------- optimizer

    def learner_groups(self) -> Iterator[dict[str, Any]]:
        """Parameter groups of student and method, learning rates set."""
        yield {"name": "student", "params": list(self.student.parameters()), "lr": self.lr}
        for group in self.method.parameter_groups():
            scale = group.pop("lr_scale", 1.0)
            yield {**group, "lr": self.lr * scale}

    def make_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """Steps of ``lr_decay`` at the milestones after a linear warm-up, one step an epoch.

        Args:
            optimizer: whose learning rates follow.
        """
        steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(self.milestones), gamma=self.lr_decay)
        if not self.warmup_epochs:
            return steps
        start = 1.0 / (self.warmup_epochs + 1)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=self.warmup_epochs)
        return torch.optim.lr_scheduler.ChainedScheduler([steps, warmup], optimizer)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD over student and method, learning rate stepped once an epoch."""
        optimizer = torch.optim.SGD(
            list(self.learner_groups()), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "name": "lr"}}

    # ---------------------------------------------------------------- checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an export needs, as plain data; weights that are not finite are not written.

        Raises:
            NonFiniteError: naming what is not finite.
        """
        self.guard.flush(self)
        state: Mapping[str, Tensor] = checkpoint.get("state_dict", {})
        parameters = (name for name, _ in self.named_parameters())
        check_weights(self, state, {*parameters, *(name for name in state if name.startswith("student."))})
        data = getattr(self.trainer, "datamodule", None)
        checkpoint["ackd_lightning"] = {
            "version": __version__,
            "num_classes": self.num_classes,
            "input_size": self.input_size,
            "mean": list(self.mean) if self.mean else None,
            "std": list(self.std) if self.std else None,
            "data": type(data).__name__ if data is not None else None,
            "method": type(self.method).__name__,
            "seed": self.seed,
            "epoch": self.current_epoch + 1,
            "skipped": self.guard.skipped,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting skipped steps."""
        self.guard.skipped = checkpoint.get("ackd_lightning", {}).get("skipped", 0)
