"""The loop of every method without opponents: one optimizer, automatic optimisation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ackd_lightning._version import __version__
from ackd_lightning.callbacks.health import TEACHER_GATES, HealthMonitor, TeacherGate
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import AdversarialMethod, Method, describe, from_description
from ackd_lightning.methods.ce import CE
from ackd_lightning.models.features import probe
from ackd_lightning.models.heads import HeadedNetwork
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.random import mix, seed_device
from ackd_lightning.training.evaluation import Evaluation
from ackd_lightning.training.means import TermMeans
from ackd_lightning.training.nonfinite import ON_NAN, FiniteGuard, OnNan, SkippingModule, check_weights
from ackd_lightning.training.schedule import check_recipe, stepped
from ackd_lightning.training.teacher_cache import TeacherCache, view_key
from ackd_lightning.training.teachers import Teachers
from ackd_lightning.types import Batch, NetOutput, NetSpec, read_batch


class DistillationModule(SkippingModule):
    """Trains a student with a method: plain training, KD, and every method that has no discriminators.

    Batches are ``(image, target)`` or ``(image, target, index)``, images already normalised.

    Args:
        student: name for ``create_model``, or a network.
        num_classes: K.
        method: the distillation method; None: plain training.
        teacher: name, network or ``FrozenTeacher``, or a list of them for methods that learn from several; None for
            methods without one.
        teacher_weights: weight file of a teacher given by name; a list for a list.
        student_options: for ``create_model``.
        teacher_options: for ``create_model``; of a single teacher.
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
        teacher_cache: folder of ``ackd cache`` with the teacher's logits for every view; the teacher is not run then.
        on_nan: what a loss that is not finite does: ``stop`` ends the run before such a step reaches a checkpoint,
            ``skip`` leaves the step out and counts it (``train/skipped``).
        channels_last: lay out images and convolutions with the channels last, which most hardware prefers; results
            differ by rounding only.
        compile: compile student, teachers and discriminators (``torch.nn.Module.compile``) when a fit begins, BatchNorm
            of frozen teachers folded into their convolutions; the first steps take a minute or so, state dicts keep
            their keys, results differ by rounding only.
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
        teacher: Sequence[str | nn.Module] | str | nn.Module | None = None,
        teacher_weights: Sequence[str] | str | None = None,
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
        teacher_cache: str | None = None,
        on_nan: OnNan = "stop",
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002  # torch's word for it
        seed: int | None = None,
    ) -> None:
        super().__init__()
        given = [teacher] if isinstance(teacher, (str, nn.Module)) else list(teacher or ())
        modules: dict[str, Sequence[object]] = {"student": [student], "method": [method], "teacher": given}
        ignore = [name for name, values in modules.items() if any(isinstance(each, nn.Module) for each in values)]
        self.save_hyperparameters(ignore=ignore)
        if teacher_gate not in TEACHER_GATES:
            raise ACKDError(f"teacher_gate is {teacher_gate!r}; it must be one of {', '.join(TEACHER_GATES)}")
        if on_nan not in ON_NAN:
            raise ACKDError(f"on_nan is {on_nan!r}; it must be one of {', '.join(ON_NAN)}")
        if isinstance(student, nn.Module) and any(each is student for each in given):
            raise ACKDError("teacher and student are the same network; a frozen teacher cannot learn, pass a copy")
        check_recipe(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            milestones=milestones,
            lr_decay=lr_decay,
            warmup_epochs=warmup_epochs,
            gradient_clip_val=gradient_clip_val,
        )
        self.num_classes, self.input_size = num_classes, input_size
        self.mean, self.std = (tuple(mean) if mean else None), (tuple(std) if std else None)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.milestones, self.lr_decay, self.warmup_epochs = tuple(milestones), lr_decay, warmup_epochs
        self.clip_norm, self.gate = gradient_clip_val, teacher_gate
        self.guard = FiniteGuard(on_nan)
        self.teacher_cache, self.cache = teacher_cache, cast("TeacherCache | None", None)
        self.channels_last, self.compiles = channels_last, compile
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) if seed is None else seed

        described: object = method  # a checkpoint hands over what `describe` wrote
        resolved = from_description(described) if isinstance(described, Mapping) else (method or self.default_method())
        self._check_method(resolved)
        backbone = (
            create_model(student, num_classes, **(student_options or {})) if isinstance(student, str) else student
        )
        self.student = BranchyStudent(backbone, resolved.branches, num_classes=num_classes)
        self.method: Method = resolved
        self.spec: NetSpec = probe(self.student, input_size)
        if self.spec.num_classes != num_classes:
            raise ACKDError(
                f"the student has {self.spec.num_classes} classes and num_classes is {num_classes}; make them equal"
            )
        self.teachers = Teachers(
            self.method.choose_teachers(given),
            weights=teacher_weights,
            options=teacher_options or {},
            num_classes=num_classes,
            bf16=teacher_bf16,
            data=(self.mean, self.std, input_size),
        )
        if self.mean and self.std:
            pairs = list(zip(self.mean, self.std, strict=True))
            self.method.set_range([-mean / std for mean, std in pairs], [(1 - mean) / std for mean, std in pairs])
        self.method.teacher_specs = self.teachers.specs
        self.method.attach(self.student, self.teachers.structures)
        self.method.build(self.spec, self.teacher_spec)
        if "method" not in self.hparams or not isinstance(self.hparams["method"], Mapping):
            self.save_hyperparameters({"method": describe(self.method)})
        # read by torch's DistributedDataParallel
        self._ddp_params_and_buffers_to_ignore = [f"method.{name}" for name in self.method.equal_buffers]
        self.evaluation, self.means = Evaluation(self.spec), TermMeans()
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

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The first teacher; None without one, and before a teacher given by name is loaded."""
        return self.teachers.frozen[0] if self.teachers.frozen else None

    @property
    def teacher_spec(self) -> NetSpec | None:
        """Shapes of the first teacher."""
        return self.teachers.specs[0] if self.teachers.specs else None

    def load_teacher(self) -> None:
        """Load teachers given by name; nothing to do when they are there or not needed.

        Raises:
            ACKDError: when a weight file is missing or does not fit.
        """
        self.teachers.load()

    def _apply(self, fn: Any, recurse: bool = True) -> DistillationModule:
        if "teachers" in self.__dict__:
            self.teachers.apply(fn, recurse)
        return cast(DistillationModule, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    # ---------------------------------------------------------------- hooks

    def setup(self, stage: str) -> None:
        """Load the teachers and tell the method what it asks of them and of the data, when a fit begins.

        Raises:
            ACKDError: when the method has to know the class of every training image and the data do not tell.
        """
        if stage != "fit":
            return
        self.load_teacher()
        before = self._method_sizes()
        self.method.adopt(self.teachers.frozen)
        epochs = self.trainer.max_epochs
        if epochs is not None and epochs > 0:
            self.method.set_total_epochs(epochs)
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
        self._speed_up()
        self._open_cache()
        if self.method.takes_teachers or self._method_sizes() != before:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.setup(self.trainer, self, stage)  # it has copied the module as it was before

    def _open_cache(self) -> None:
        """Read the teacher's logits from a cache, when there is one."""
        if self.teacher_cache is None:
            return
        data, epochs = getattr(self.trainer, "datamodule", None), self.trainer.max_epochs
        if not isinstance(data, ImageDataModule) or not epochs or epochs < 1:
            raise ACKDError(
                "teacher_cache is for this package's data modules and a fixed trainer.max_epochs; leave it out"
            )
        key = view_key(self, data, str(self.trainer.precision))
        self.cache = TeacherCache(Path(self.teacher_cache), key, epochs)

    def _speed_up(self) -> None:
        """Memory layout and compilation, as the constructor was told."""
        networks: list[nn.Module] = [self.student, self.method, *self.teachers.frozen]
        if self.compiles and not self.method.takes_teachers:
            for teacher in self.teachers.frozen:
                teacher.fold(self.input_size)
        if self.channels_last:
            for network in networks:
                network.to(memory_format=torch.channels_last)
        if self.compiles:
            parts = [self.method.get_submodule(name) for name in self.method.worth_compiling]
            for network in (self.student, *self.teachers.frozen, *parts):
                network.compile(dynamic=False)

    def _method_sizes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.method.state_dict().items()}

    def configure_callbacks(self) -> list[L.Callback]:
        """Teacher gate and alarms travel with the module into any Trainer."""
        own: list[L.Callback] = getattr(self._trainer, "callbacks", [])
        watched = any(isinstance(each, HealthMonitor) for each in own)
        callbacks: list[L.Callback] = [HealthMonitor()] if self.spec.branches and not watched else []
        if self.method.needs_teacher and self.gate != "off":
            callbacks.append(TeacherGate(stop=self.gate == "stop"))
        if self.method.makes_examples:
            from ackd_lightning.callbacks.examples import ExamplePictures  # draws, and needs matplotlib for it

            asked = any(isinstance(each, ExamplePictures) for each in own)
            callbacks += [ExamplePictures()] if self.trainer.loggers and not asked else []  # else: no folder of a run
        return callbacks

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the networks' own noise by (seed, epoch, batch, rank), so that a resumed run draws the same."""
        self.method.set_epoch(self.current_epoch)  # here and not at an epoch's start, which a resumed run skips
        seed_device(mix(self.seed, self.current_epoch, batch_idx, self.global_rank), self.device)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip by norm, after mixed precision has unscaled."""
        if self.clip_norm is not None:
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    # ---------------------------------------------------------------- steps

    def forward(self, image: Tensor) -> Tensor:
        """Logits of the network that is kept: the target learner, with the head that its method gives it.

        Args:
            image: ``B x C x H x W``.

        Returns:
            ``B x K``.
        """
        output: NetOutput = self.student(image)
        return self.method.prediction(output)

    def as_batch(self, batch: Any) -> Batch:
        """Read ``(image, target)`` or ``(image, target, index)``.

        Args:
            batch: from any data module.

        Raises:
            ACKDError: when it is neither, or the images have another size than the module was built for.
        """
        result = read_batch(batch, self.input_size)
        if not self.channels_last:
            return result
        return result._replace(image=result.image.contiguous(memory_format=torch.channels_last))

    def outputs(self, batch: Batch) -> tuple[NetOutput, NetOutput | None]:
        """One forward pass of teacher and student; no output of a teacher for a method that runs the teachers itself.

        Args:
            batch: images.
        """
        if self.cache is not None:
            return self.student(batch.image), self.cache.read(self.current_epoch, batch.index)
        runs = self.teacher is not None and not self.method.takes_teachers
        teacher = cast(FrozenTeacher, self.teacher)(batch.image) if runs else None
        return self.student(batch.image), teacher

    def training_parameters(self) -> int:
        """Parameters that learn: of the student with its learners, and of the method."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad)

    def kept_network(self) -> nn.Module:
        """The network that is left in the end: the plain backbone, with the head that the method gives it."""
        head = self.method.head
        return self.student.plain() if head is None else HeadedNetwork(self.student.plain(), head)

    def networks_in_training(self) -> tuple[nn.Module, ...]:
        """Student and method."""
        return self.student, self.method

    def weighted_loss(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of a method's terms.

        Args:
            terms: unweighted scalars by name.
        """
        weights = self.method.weights()
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    def log_terms(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Batch) -> None:
        """Log the loss and every unweighted term: means over the epoch, besides the loss of steps that loggers write.

        Args:
            loss: weighted sum.
            terms: unweighted.
            batch: gives the batch size.
        """
        size = batch.image.shape[0]
        self.means.add({"train/loss": loss, **{f"train/{name}": value for name, value in terms.items()}}, size)
        trainer = self.trainer
        shown = trainer.progress_bar_callback is not None  # a bar waits for the number in every step
        if shown or trainer.fast_dev_run or trainer._logger_connector.should_update_logs:  # type: ignore[attr-defined]
            self.log("train/loss_step", loss.detach(), prog_bar=shown, batch_size=size)
        if trainer.is_last_batch:
            self._log_means()

    def _log_means(self) -> None:
        """Log the means of an epoch; every process has to call it."""
        means = dict(self.means.compute())
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self.means.reset()

    def on_train_start(self) -> None:
        """Forget what an earlier fit has left of an epoch."""
        self.means.reset()

    def on_train_epoch_end(self) -> None:
        """Log the means of an epoch that was cut short."""
        super().on_train_epoch_end()
        self._log_means()

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

    def looks_at_test(self) -> bool:
        """True when the data has no validation part, so that the fit's evaluation shows test data."""
        data = getattr(self.trainer, "datamodule", None)
        return isinstance(data, ImageDataModule) and data.val_is_test

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy of the target learner, each auxiliary learner and the ensemble."""
        self.evaluation.update(self, batch, "test" if self.looks_at_test() else "val")

    def on_validation_epoch_end(self) -> None:
        """Log CKA, disagreement and spread of the learners."""
        self.evaluation.end(self)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As validation, on test data."""
        self.evaluation.update(self, batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log CKA, disagreement and spread of the learners."""
        self.evaluation.end(self)

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
        return stepped(optimizer, self.milestones, lr_decay=self.lr_decay, warmup_epochs=self.warmup_epochs)

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
            "head": None if self.method.head is None else self.method.head.description(),
            "learners": list(self.student.specs),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting skipped steps."""
        self.guard.skipped = checkpoint.get("ackd_lightning", {}).get("skipped", 0)
