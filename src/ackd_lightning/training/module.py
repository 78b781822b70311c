"""The training module: a student, a method and frozen teachers in one `LightningModule`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from ackd_lightning._version import __version__
from ackd_lightning.callbacks.health import HealthMonitor, TeacherGate
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.ackd import ACKD
from ackd_lightning.methods.base import FitInfo, Method, Networks, describe, from_description, weighted_loss
from ackd_lightning.methods.ce import CE
from ackd_lightning.models.features import probe
from ackd_lightning.models.heads import HeadedNetwork
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.random import mix, seed_device
from ackd_lightning.runs.export import Exported, write_student
from ackd_lightning.training.evaluation import Evaluation
from ackd_lightning.training.manual import ManualSteps
from ackd_lightning.training.means import TermMeans
from ackd_lightning.training.nonfinite import NonFiniteGuard, OnNonFinite, check_weights
from ackd_lightning.training.schedule import (
    OptimizerFactory,
    Recipe,
    SchedulerFactory,
    build_scheduler,
    describe_factory,
    reads_metric,
    scale_learning_rates,
    without_decay,
)
from ackd_lightning.training.teacher_cache import TeacherCache, view_key
from ackd_lightning.training.teachers import (
    GivenTeacher,
    Teachers,
    as_configs,
    chosen,
    compare_classes,
    describe_teachers,
)
from ackd_lightning.types import Batch, DataInfo, NetOutput, NetSpec, read_batch
from ackd_lightning.validation import check_arguments


class DistillationModule(ManualSteps):
    """Train a student with a distillation method.

    Batches are ``(image, target)`` or ``(image, target, index)`` with normalised images. A method with optimizers of
    its own is trained by manual optimization, every other by automatic optimization.

    Args:
        student: Model name for `create_model`, or a network.
        method: Distillation method; None for plain training.
        teacher: Model name, network, `FrozenTeacher` or `TeacherConfig`; a list of these for methods that learn from
            several teachers; None for methods without one.
        data: Classes, image size and normalisation of the data. None is allowed for a student that is a network: then
            its classes are counted, images have 32 x 32 pixels, and their normalisation is unknown.
        student_options: Options of a student given by name, for `create_model`.
        optimizer: Function of parameter groups that returns the student's optimizer. Default: SGD with learning rate
            0.1, momentum 0.9 and weight decay 5e-4, as in the ACKD paper.
        lr_scheduler: Function of an optimizer that returns its learning rate schedule, for the student's optimizer and
            those of the method. Default: times 0.1 after epochs 100 and 150. None for a constant learning rate. A
            ``CosineAnnealingLR`` with ``T_max`` 0 is as long as the fit.
        recipe: Interval of the schedule, warm-up, gradient clipping, and which parameters have weight decay.
        on_nonfinite: How to handle a non-finite loss: ``stop`` ends the run before such a step reaches a checkpoint,
            ``skip`` skips the step and counts it (``train/skipped``).
        on_class_mismatch: How to handle class names of a teacher's file or a checkpoint that are not those of the data:
            ``stop`` refuses them, ``ignore`` takes classes by their number. The same names in another order are
            matched either way but for ``ignore``.
        channels_last: Lay out images and convolutions with channels last, which most hardware prefers. Results differ
            by rounding only.
        compile: Compile student, teachers and discriminators when a fit starts, with BatchNorm of frozen teachers fused
            into their convolutions. The first steps take about a minute, state dicts keep their keys, and results
            differ by rounding only.
        seed: Seed of noise inside the networks (dropout); None for that of ``seed_everything`` or
            ``torch.manual_seed``.

    Raises:
        ACKDError: If arguments do not go together.

    Example:
        >>> from ackd_lightning.methods import KD
        >>> module = DistillationModule("resnet8", method=KD(), teacher="resnet14", data=DataInfo(num_classes=10))
        >>> module.data.input_size
        32
    """

    def __init__(
        self,
        student: str | nn.Module,
        *,
        method: Method | None = None,
        teacher: GivenTeacher | Sequence[GivenTeacher] | None = None,
        data: DataInfo | None = None,
        student_options: dict[str, Any] | None = None,
        optimizer: OptimizerFactory = lambda groups: SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: SchedulerFactory | None = lambda optimizer: MultiStepLR(optimizer, milestones=[100, 150]),
        recipe: Recipe | None = None,
        on_nonfinite: OnNonFinite = "stop",
        on_class_mismatch: Literal["stop", "ignore"] = "stop",
        channels_last: bool = False,
        compile: bool = False,  # noqa: A002  # torch's word for it
        seed: int | None = None,
    ) -> None:
        super().__init__()
        flags = {
            "on_nonfinite": on_nonfinite,
            "on_class_mismatch": on_class_mismatch,
            "channels_last": channels_last,
            "compile": compile,
            "seed": seed,
        }
        check_arguments(DistillationModule, flags)
        # a checkpoint holds plain data, which comes back here
        self.recipe = Recipe(**recipe) if isinstance(recipe, Mapping) else recipe or Recipe()
        given_data = DataInfo(**data) if isinstance(data, Mapping) else data
        self.optimizer_factory = _factory(optimizer)
        self.scheduler_factory = _constant if lr_scheduler is None else _factory(lr_scheduler)
        self.method: Method = (
            from_description(method) if isinstance(method, Mapping) else method or self.default_method()
        )
        self.guard, self.means = NonFiniteGuard(on_nonfinite), TermMeans()
        self.channels_last, self.compiles = channels_last, compile
        self.matches_classes = on_class_mismatch == "stop"
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) if seed is None else seed
        configs = chosen(as_configs(teacher), self.method)
        if isinstance(student, nn.Module) and any(each.network is student for each in configs):
            raise ACKDError("teacher and student are the same network; a frozen teacher cannot learn, pass a copy")

        if isinstance(student, str):
            if given_data is None:
                raise ACKDError(
                    f"the student is named {student!r} and its number of classes is unknown; pass data=DataInfo(...)"
                )
            backbone = create_model(student, given_data.num_classes, **(student_options or {}))
        else:
            backbone = student
        size = 32 if given_data is None else given_data.input_size
        classes = None if given_data is None else given_data.num_classes
        self.student = BranchyStudent(backbone, self.method.branches, num_classes=classes, input_size=size)
        self.spec: NetSpec = probe(self.student, size)
        self.data = given_data or DataInfo(self.spec.num_classes, size)
        if self.spec.num_classes != self.data.num_classes:
            raise ACKDError(
                f"the student has {self.spec.num_classes} classes and the data have {self.data.num_classes}; make them "
                "equal"
            )
        self.teachers = Teachers(configs, self.data)
        networks = Networks(
            student=self.spec,
            teachers=self.teachers.specs,
            student_network=self.student,
            teacher_networks=self.teachers.structures,
            pixel_range=self._pixel_range(),
        )
        self.method.build(networks)
        self.auxiliary, self.monitors = self.method.auxiliary_parameters(), {}
        # read by torch's DistributedDataParallel
        self._ddp_params_and_buffers_to_ignore = [f"method.{name}" for name in self.method.replicated_buffers]
        if self.auxiliary:
            self.use_manual_optimization()
        self.evaluation = Evaluation(self.spec, self.method)
        self.cache = cast("TeacherCache | None", None)
        self._last: tuple[NetOutput, NetOutput | None, Batch] | None = None
        self.save_hyperparameters(
            {
                "student": getattr(backbone, "model_name", None),
                "student_options": getattr(backbone, "model_options", None),
                "method": describe(self.method),
                "teacher": describe_teachers(configs),
                "data": {
                    key: list(each) if isinstance(each, tuple) else each for key, each in asdict(self.data).items()
                },
                "optimizer": describe_factory(optimizer),
                "lr_scheduler": describe_factory(lr_scheduler),
                "recipe": asdict(self.recipe),
                **flags,
            }
        )
        for name, argument in (("student", student), ("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
            if self.hparams[name] is None and argument is not None:
                self.hparams.pop(name)  # a network, or a function: not plain data

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let an overridden ``configure_optimizers`` return the student's optimizer alone."""
        super().__init_subclass__(**kwargs)
        if (own := cls.__dict__.get("configure_optimizers")) is not None:
            cls.configure_optimizers = _with_method_optimizers(own)  # type: ignore[method-assign, assignment]

    @classmethod
    def from_data(cls, data: L.LightningDataModule, student: str | nn.Module, **arguments: Any) -> DistillationModule:
        """Build a module for the classes, image size and normalisation of a data module.

        Args:
            data: Data module with an attribute ``info`` (`DataInfo`), as all of this package.
            student: Model name or network.
            arguments: Further arguments of the constructor.

        Raises:
            ACKDError: If the data module has no ``info``.
        """
        info = getattr(data, "info", None)
        if not isinstance(info, DataInfo):
            raise ACKDError(
                f"{type(data).__name__} has no attribute `info`; pass data=DataInfo(...) to the constructor"
            )
        return cls(student, data=info, **arguments)

    def default_method(self) -> Method:
        """Return the method of a module that was given none."""
        return CE()

    def _pixel_range(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        if self.data.mean is None or self.data.std is None:
            return None
        pairs = list(zip(self.data.mean, self.data.std, strict=True))
        return tuple(-mean / std for mean, std in pairs), tuple((1 - mean) / std for mean, std in pairs)

    # ---------------------------------------------------------------- teacher

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The first teacher; None without one, and before a teacher given by name is loaded."""
        return self.teachers.frozen[0] if self.teachers.frozen else None

    @property
    def teacher_spec(self) -> NetSpec | None:
        """Shapes of the first teacher; None without one."""
        return self.teachers.specs[0] if self.teachers.specs else None

    def load_teacher(self) -> None:
        """Load teachers given by name. Nothing happens when they are loaded or not needed.

        Raises:
            ACKDError: If a weight file is missing or does not fit.
        """
        self.teachers.load()

    def _apply(self, fn: Any, recurse: bool = True) -> DistillationModule:
        if "teachers" in self.__dict__:
            self.teachers.apply(fn, recurse)
        return cast(DistillationModule, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    # ---------------------------------------------------------------- hooks

    def setup(self, stage: str) -> None:
        """Load the teachers and tell the method about the fit."""
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names:
            self.data = replace(self.data, class_names=tuple(names))
        if stage != "fit":
            return
        self.load_teacher()
        self._match_teachers()
        before = self._method_sizes()
        self._begin_fit()
        self._speed_up()
        self._open_cache()
        if self.method.teacher == "own" or self._method_sizes() != before:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.setup(self.trainer, self, stage)  # it has copied the module as it was before

    def _begin_fit(self) -> None:
        """Tell the method about the fit."""
        data, epochs = getattr(self.trainer, "datamodule", None), self.trainer.max_epochs
        targets = getattr(data, "train_targets", None)
        self.method.begin_fit(
            FitInfo(
                epochs=epochs if epochs is not None and epochs > 0 else None,
                batch_size=getattr(data, "batch_size", None),
                targets=None if targets is None else torch.as_tensor(targets),
                seed=self.seed,
                teachers=self.teachers.frozen,
            )
        )

    def _match_teachers(self) -> None:
        """Bring the teachers' logits into the order of the data's classes, and say so."""
        if self.data.class_names is None or not self.matches_classes:
            return
        reordered = self.teachers.match_classes(self.data.class_names, reorder=self.method.teacher != "own")
        if reordered:
            self.print(f"classes of teacher {', '.join(reordered)} are reordered to those of the data")

    def _match_data(self, names: Sequence[str], origin: str) -> None:
        """Bring the data's classes into the order in which a checkpoint was trained, and say so."""
        data, own = getattr(self._trainer, "datamodule", None), self.data.class_names
        if self._trainer is None or own is None or own == tuple(names) or not self.matches_classes:
            return
        compare_classes(names, own, origin, "the data")
        reorder = getattr(data, "use_class_order", None)
        if reorder is None:
            raise ACKDError(
                f"{origin} has the classes of the data in another order and {type(data).__name__} has no method "
                "`use_class_order`; give the data the order of the checkpoint, or pass on_class_mismatch='ignore'"
            )
        reorder(names)
        self.data = replace(self.data, class_names=tuple(names))
        self.print(f"classes of the data are reordered to those of {origin}")
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._match_teachers()
            self._begin_fit()

    def _open_cache(self) -> None:
        """Open the cache of the teacher's logits, where one is named."""
        folder = next((each.cache for each in self.teachers.configs if each.cache is not None), None)
        if folder is None:
            return
        data, epochs = getattr(self.trainer, "datamodule", None), self.trainer.max_epochs
        if not isinstance(data, ImageDataModule) or not epochs or epochs < 1:
            raise ACKDError(
                f"teacher.cache is {folder} and works with this package's data modules and a fixed trainer.max_epochs "
                "only; leave it out"
            )
        self.cache = TeacherCache(Path(folder), view_key(self, data, str(self.trainer.precision)), epochs)

    def _speed_up(self) -> None:
        """Change memory layout and compile."""
        networks: list[nn.Module] = [self.student, self.method, *self.teachers.frozen]
        if self.compiles and self.method.teacher != "own":
            for teacher in self.teachers.frozen:
                teacher.fuse(self.data.input_size)
        if self.channels_last:
            for network in networks:
                network.to(memory_format=torch.channels_last)
        if self.compiles:
            parts = [self.method.get_submodule(name) for name in self.method.compile_modules]
            for network in (self.student, *self.teachers.frozen, *parts):
                network.compile(dynamic=False)

    def _method_sizes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.method.state_dict().items()}

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the teacher gate and the alarms, which come with the module into any Trainer."""
        own: list[L.Callback] = getattr(self._trainer, "callbacks", [])
        watched = any(isinstance(each, HealthMonitor) for each in own)
        callbacks: list[L.Callback] = [HealthMonitor()] if self.spec.branches and not watched else []
        gates = {each.gate for each in self.teachers.configs} - {"off"}
        if gates:
            callbacks.append(TeacherGate(stop="stop" in gates))
        if hasattr(self.method, "examples"):
            from ackd_lightning.callbacks.examples import ExamplePictures  # needs matplotlib

            asked = any(isinstance(each, ExamplePictures) for each in own)
            callbacks += [ExamplePictures()] if self.trainer.loggers and not asked else []  # else: no folder of a run
        return callbacks

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the networks' own noise by (seed, epoch, batch, rank), so that a resumed run draws the same."""
        self.rearm_buffer_broadcast()
        self.method.set_epoch(self.current_epoch)  # here and not at an epoch's start, which a resumed run skips
        seed_device(mix(self.seed, self.current_epoch, batch_idx, self.global_rank), self.device)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip gradients by norm, after mixed precision has unscaled them."""
        if self.recipe.gradient_clip_val is not None:
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.recipe.gradient_clip_val)

    # ---------------------------------------------------------------- steps

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of the network that is kept: the student with the head that its method gives it.

        Args:
            image: ``B x C x H x W``.

        Returns:
            ``B x K``.
        """
        return self.prediction(self.student(image))

    def prediction(self, student: NetOutput) -> Tensor:
        """Return logits ``B x K`` of the network that is kept.

        Args:
            student: Output of the student.
        """
        if self.method.head is None:
            return student.logits
        assert student.features is not None
        logits: Tensor = self.method.head(student.features[-1])
        return logits

    def as_batch(self, batch: Any) -> Batch:
        """Read ``(image, target)`` or ``(image, target, index)``.

        Args:
            batch: Batch of any data module.

        Raises:
            ACKDError: If it is neither, or the images have another size than the module was built for.
        """
        result = read_batch(batch, self.data.input_size)
        if not self.channels_last:
            return result
        return result._replace(image=result.image.contiguous(memory_format=torch.channels_last))

    def outputs(self, batch: Batch) -> tuple[NetOutput, NetOutput | None]:
        """Run teacher and student once; a method that runs its teachers itself gets None.

        Args:
            batch: Images.
        """
        if self.cache is not None:
            return self.student(batch.image), self.cache.read(self.current_epoch, batch.index)
        runs = self.teacher is not None and self.method.teacher != "own"
        teacher = cast(FrozenTeacher, self.teacher)(batch.image) if runs else None
        return self.student(batch.image), teacher

    def training_parameters(self) -> int:
        """Return the number of parameters that learn, of the student with its learners and of the method."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad)

    def kept_network(self) -> nn.Module:
        """Return the network that is left after training: the plain student, with the head that the method gives it."""
        head = self.method.head
        return self.student.plain() if head is None else HeadedNetwork(self.student.plain(), head)

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
        if getattr(own, "model_name", None) is None:
            raise ACKDError(
                f"the student is a {type(own).__name__}, which create_model does not build, so {target} could not "
                "describe it; write its weights with save_weights(module.kept_network(), path)"
            )
        if target.exists() and not overwrite:
            raise ACKDError(f"{target} exists; choose another file or pass overwrite=True")
        checkpoint = {
            "ackd_lightning": self.metadata(),
            "hyper_parameters": dict(self.hparams),
            "state_dict": self.state_dict(),
        }
        return write_student(checkpoint, target)

    def networks_in_training(self) -> tuple[nn.Module, ...]:
        """Return student and method."""
        return self.student, self.method

    def log_terms(self, loss: Tensor, terms: Mapping[str, Tensor], batch: Batch) -> None:
        """Log means over the epoch of the loss and every unweighted term, and the loss of steps that loggers write.

        Args:
            loss: Weighted sum.
            terms: Unweighted terms.
            batch: Batch of the step.
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
        """Discard what an earlier fit has left, and warn about a learning rate scale that is not applied."""
        self.means.reset()
        self._resume_loader()
        scales = {each["name"]: each["lr_scale"] for each in self.method.parameter_groups() if each["lr_scale"] != 1.0}
        overridden = type(self).configure_optimizers is not DistillationModule.configure_optimizers
        rates = {group["lr"] for group in self.trainer.optimizers[0].param_groups}
        if scales and overridden and len(rates) == 1:
            name, scale = next(iter(scales.items()))
            rank_zero_warn(
                f"method {type(self.method).__name__} trains {name} at {scale} times the learning rate, and "
                f"{type(self).__name__}.configure_optimizers does not; call self.scale_learning_rates(optimizer) there"
            )

    def _resume_loader(self) -> None:
        """Let a resumed run continue in the middle of an epoch.

        Lightning loses the loader's position when ``configure_optimizers`` reads ``trainer.estimated_stepping_batches``,
        because that creates the loader before the checkpoint is restored.
        """
        loop = self.trainer.fit_loop
        if loop.restarting and loop._combined_loader_states_to_load:
            loop._load_combined_loader_states()
            iter(cast(Any, loop._data_fetcher))

    def on_train_epoch_end(self) -> None:
        """Log the means of an epoch that was cut short."""
        super().on_train_epoch_end()
        self._log_means()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Train on one batch.

        Returns:
            The weighted loss, 0 for a skipped batch; None with manual optimization.
        """
        batch = self.as_batch(batch)
        if not self.automatic_optimization:
            self.manual_step(batch)
            return None
        before = self.statistics_before()
        student, teacher = self.outputs(batch)
        terms = self.method(student, teacher, batch)
        loss = weighted_loss(self.method, terms)
        if self.skips({**terms, "loss": loss}, before):
            return torch.zeros_like(loss)  # without a backward pass: Lightning refuses None with several processes
        self._last = student, teacher, batch
        self.log_terms(loss, terms, batch)
        return loss

    def on_after_backward(self) -> None:
        """Update the method's memories."""
        if self._last is not None and self.automatic_optimization:
            self.update_memories(*self._last)
            self._last = None

    def looks_at_test(self) -> bool:
        """Return whether the data have no validation part, so that validation reads the test set."""
        data = getattr(self.trainer, "datamodule", None)
        return isinstance(data, ImageDataModule) and data.val_is_test

    def on_validation_epoch_start(self) -> None:
        """Choose the split that logging keys name."""
        self.evaluation.begin("test" if self.looks_at_test() else "val")

    def on_test_epoch_start(self) -> None:
        """Choose the split that logging keys name."""
        self.evaluation.begin("test")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the student, each auxiliary learner and their ensemble on a batch."""
        batch = self.as_batch(batch)
        student: NetOutput = self.student(batch.image)
        self.evaluation.update(self, self.method, student, self.prediction(student), batch.target)

    def on_validation_epoch_end(self) -> None:
        """Log how similar the learners are."""
        self.evaluation.end(self)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure on a batch of test data."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log how similar the learners are."""
        self.evaluation.end(self)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Return class, its probability, target and index of every image.

        Returns:
            Four tensors of length B.
        """
        batch = self.as_batch(batch)
        probability, prediction = self(batch.image).float().softmax(dim=1).max(dim=1)
        return {"index": batch.index, "target": batch.target, "prediction": prediction, "probability": probability}

    # ---------------------------------------------------------------- optimizer

    def learner_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of student and method, without learning rates.

        For an overridden ``configure_optimizers``: ``AdamW(self.learner_groups(), lr=1e-3)`` trains at 1e-3.
        """
        groups = [{"name": "student", "params": list(self.student.parameters())}]
        groups += [{"name": each["name"], "params": each["params"]} for each in self.method.parameter_groups()]
        return groups if self.recipe.decay_norm_and_bias else without_decay(groups)

    def scale_learning_rates(self, optimizer: Optimizer) -> None:
        """Multiply the learning rates of groups that the method trains more slowly or faster than the student.

        Args:
            optimizer: Optimizer of `learner_groups`, without a schedule yet.
        """
        scales = {id(each): group["lr_scale"] for group in self.method.parameter_groups() for each in group["params"]}
        scale_learning_rates(optimizer, scales)

    def _schedule(self, optimizer: Optimizer, name: str, *, own_rate: bool) -> dict[str, Any]:
        """Build a learning rate schedule in Lightning's form; `own_rate` keeps the optimizer's rate as the largest."""
        trainer, epochs, per_epoch = self.trainer, self.trainer.max_epochs, 1.0
        length = float("inf") if epochs is None or epochs < 1 else float(epochs)
        if self.recipe.interval == "step":
            length = float(trainer.estimated_stepping_batches)  # loads the data, which num_training_batches needs
            per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        scheduler = build_scheduler(
            self.scheduler_factory,
            optimizer,
            self.recipe,
            steps_per_epoch=per_epoch,
            length=length,
            own_rate=own_rate,
        )
        found = {"scheduler": scheduler, "name": name, "interval": self.recipe.interval}
        return {**found, "monitor": "val/loss", "reduce_on_plateau": True} if reads_metric(scheduler) else found

    def configure_optimizers(self) -> Any:
        """Build the student's optimizer, those of the method, and their schedules."""
        optimizer = self.optimizer_factory(self.learner_groups())
        self.scale_learning_rates(optimizer)
        return self.add_method_optimizers([optimizer], [self._schedule(optimizer, "lr", own_rate=False)])

    def add_method_optimizers(
        self, optimizers: list[Optimizer], schedules: list[Any]
    ) -> tuple[list[Optimizer], list[Any]]:
        """Add the optimizers of the method, on the schedule of the module.

        Args:
            optimizers: The student's optimizer.
            schedules: Its schedule in Lightning's form; may be empty.
        """
        own = self.method.auxiliary_optimizers()
        added = [self._schedule(each, f"lr/{name}", own_rate=True) for name, each in own.items()]
        return [*optimizers, *own.values()], self._without_monitors([*schedules, *added])

    def _without_monitors(self, schedules: list[Any]) -> list[Any]:
        """Keep the names of monitored metrics; Lightning would warn and forget them in manual optimization."""
        if self.automatic_optimization:
            return schedules
        found = []
        for each in schedules:
            if isinstance(each, Mapping):
                if each.get("monitor") is not None:
                    self.monitors[id(each["scheduler"])] = str(each["monitor"])
                each = {key: each[key] for key in each if key not in ("monitor", "reduce_on_plateau", "strict")}
            found.append(each)
        return found

    # ---------------------------------------------------------------- checkpoint

    def metadata(self) -> dict[str, Any]:
        """Return what an export needs to know, as plain data."""
        data = getattr(self._trainer, "datamodule", None)
        return {
            "version": __version__,
            "num_classes": self.data.num_classes,
            "input_size": self.data.input_size,
            "mean": list(self.data.mean) if self.data.mean else None,
            "std": list(self.data.std) if self.data.std else None,
            "class_names": list(self.data.class_names) if self.data.class_names else None,
            "data": type(data).__name__ if data is not None else None,
            "method": type(self.method).__name__,
            "seed": self.seed,
            "epoch": self.current_epoch + 1 if self._trainer is not None else 0,
            "skipped": self.guard.skipped,
            "head": None if self.method.head is None else self.method.head.description(),
            "learners": list(self.student.specs),
        }

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the count of skipped steps, and match the data's classes with the checkpoint's."""
        metadata = checkpoint.get("ackd_lightning", {})
        self.guard.skipped = metadata.get("skipped", 0)
        if names := metadata.get("class_names"):
            self._match_data(names, "the checkpoint")


class ACKDModule(DistillationModule):
    """Adversarial collaborative knowledge distillation, ready for any Lightning project.

    A `DistillationModule` whose default method is `ACKD` with the paper's two auxiliary learners and all weights 1.

    Example:
        >>> from ackd_lightning.models.zoo import create_model
        >>> module = ACKDModule(create_model("resnet8", 10), teacher=create_model("resnet14", 10))
        >>> module.student.specs
        ('D3B1', 'D2B2')
    """

    def default_method(self) -> Method:
        """Return ACKD with the paper's learners and weights."""
        return ACKD()


def _constant(optimizer: Optimizer) -> LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _factory(given: Any) -> Any:
    """Factory of an optimizer or a schedule: as it is given, or from the plain data of a checkpoint."""
    if not isinstance(given, Mapping):
        return given
    module, _, name = str(given["class_path"]).rpartition(".")
    if module not in ("torch.optim", "torch.optim.lr_scheduler"):
        raise ACKDError(f"the checkpoint was trained with {given['class_path']}; pass that optimizer or schedule again")
    home = torch.optim if module == "torch.optim" else torch.optim.lr_scheduler
    return functools.partial(getattr(home, name), **given["init_args"])


def _with_method_optimizers(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Complete what an overridden ``configure_optimizers`` returns with the optimizers of the method."""

    @functools.wraps(own)
    def configure_optimizers(self: DistillationModule) -> Any:
        result = own(self)
        if not self.auxiliary:
            return result
        optimizers, schedules = _parts(result)
        auxiliary = {id(each) for parameters in self.auxiliary.values() for each in parameters}
        held = {id(each) for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]}
        count = len(optimizers)
        if auxiliary & held:
            schedules = self._without_monitors(schedules)
        else:
            optimizers, schedules = self.add_method_optimizers(optimizers, schedules)
        if len(optimizers) != 1 + len(self.auxiliary):
            raise ACKDError(
                f"{type(self).__name__}.configure_optimizers returns {count} optimizers, and method "
                f"{type(self.method).__name__} has {len(self.auxiliary)} of its own, which are added; return the "
                "student's optimizer alone"
            )
        return optimizers, schedules

    return configure_optimizers


def _parts(result: Any) -> tuple[list[Optimizer], list[Any]]:
    """Split one of Lightning's forms of optimizers and schedules into two lists."""
    if result is None:
        return [], []
    if isinstance(result, Optimizer):
        return [result], []
    if isinstance(result, Mapping):
        schedule = result.get("lr_scheduler")
        if schedule is not None and not isinstance(schedule, Mapping):
            schedule = {"scheduler": schedule, "monitor": result.get("monitor")}
        return [result["optimizer"]], [] if schedule is None else [schedule]
    if isinstance(result, (list, tuple)) and len(result) == 2 and isinstance(result[0], (list, tuple)):
        return list(result[0]), list(result[1])
    pairs = [_parts(each) for each in result]
    return [each for found, _ in pairs for each in found], [each for _, found in pairs for each in found]
