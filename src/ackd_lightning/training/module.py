"""The training module: a student, a method and frozen teachers in one `LightningModule`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal, cast

import lightning.pytorch as L
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from ackd_lightning.data.base import info_of
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.ackd import ACKD
from ackd_lightning.methods.base import Method, Networks, check_method
from ackd_lightning.methods.ce import CE
from ackd_lightning.methods.description import describe, from_description
from ackd_lightning.models.copies import image_channels
from ackd_lightning.models.finding import probe
from ackd_lightning.models.known import remembered
from ackd_lightning.models.student_config import StudentConfig, as_student_config, describe_student
from ackd_lightning.models.teacher_config import TeacherConfig
from ackd_lightning.plain import as_plain
from ackd_lightning.training.absent import absent_specs, describe_specs
from ackd_lightning.training.arguments import build_method, note_arguments
from ackd_lightning.training.evaluation import Evaluation
from ackd_lightning.training.factories import constant, describe_factory, factory_of
from ackd_lightning.training.fit_start import PASS_TEACHER, FitStart
from ackd_lightning.training.labels import Labels, check_labels
from ackd_lightning.training.means import TermMeans
from ackd_lightning.training.nonfinite import NonFiniteGuard, OnNonFinite
from ackd_lightning.training.overrides import check_overrides, say_uncalled
from ackd_lightning.training.schedule import OptimizerFactory, Recipe, SchedulerFactory
from ackd_lightning.training.speed import Compile
from ackd_lightning.training.students import build_student, check_quantization, keep_frozen_in_evaluation
from ackd_lightning.training.teacher_choice import GivenTeacher, as_configs, chosen, describe_teachers
from ackd_lightning.training.teachers import Teachers
from ackd_lightning.types import DataInfo, NetSpec
from ackd_lightning.validation import check_arguments

# partial and not lambda: ddp_spawn pickles the module
_SGD = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
_STEPS = partial(MultiStepLR, milestones=(100, 150))


class DistillationModule(FitStart):
    """Train a student with a distillation method.

    Batches are ``(image, target)`` or ``(image, target, index)`` with normalised images. A method with optimizers of
    its own is trained by manual optimization, every other by automatic optimization.

    Args:
        student: Model name for `create_model`, network, or `StudentConfig`.
        method: Distillation method; None for plain training.
        teacher: Model name, network, `FrozenTeacher` or `TeacherConfig`; a list of these for methods that run several
            teachers, and for those that read logits alone, which get the mean of all; None for methods without one.
        data: Classes, image size and normalisation of the data. None is allowed for a student that is a network: then
            its classes are counted, images have 32 x 32 pixels, and their normalisation is unknown.
        optimizer: Function of parameter groups that returns the student's optimizer. Default: SGD with learning rate
            0.1, momentum 0.9 and weight decay 5e-4, as in the ACKD paper.
        lr_scheduler: Function of an optimizer that returns its learning rate schedule, for the student's optimizer and
            those of the method. Default: times 0.1 after epochs 100 and 150. None for a constant learning rate. A
            ``CosineAnnealingLR`` with ``T_max`` 0 is as long as the fit.
        recipe: Interval of the schedule, warm-up, gradient clipping, which parameters have weight decay, labels,
            average of the weights, early stopping.
        on_nonfinite: How to handle a non-finite loss: ``stop`` ends the run before such a step reaches a checkpoint,
            ``skip`` skips the step and counts it (``train/skipped``).
        on_class_mismatch: How to handle class names of a teacher's file or a checkpoint that are not those of the data:
            ``stop`` refuses them, ``ignore`` takes classes by their number. The same names in another order are
            matched either way but for ``ignore``.
        channels_last: Lay out images and convolutions with channels last, which most hardware prefers. Results differ
            by rounding only.
        compile: Compile student, teachers and discriminators when a fit starts, with BatchNorm of frozen teachers fused
            into their convolutions. The first steps take about a minute, state dicts keep their keys, and results
            differ by rounding only. ``reduce-overhead`` also runs them as CUDA graphs, which need an NVIDIA GPU and
            gain most with small networks and batches.
        seed: Seed of noise inside the networks (dropout); None for that of ``seed_everything`` or
            ``torch.manual_seed``.

    Raises:
        ACKDError: If arguments do not go together.

    Examples:
        >>> from ackd_lightning.methods import KD
        >>> module = DistillationModule("resnet8", method=KD(), teacher="resnet14", data=DataInfo(num_classes=10))
        >>> module.data.input_size
        32
    """

    def __init__(
        self,
        student: str | nn.Module | StudentConfig,
        *,
        method: Method | None = None,
        teacher: GivenTeacher | Sequence[GivenTeacher] | None = None,
        data: DataInfo | None = None,
        optimizer: OptimizerFactory = _SGD,
        lr_scheduler: SchedulerFactory | None = _STEPS,
        recipe: Recipe | None = None,
        on_nonfinite: OnNonFinite = "stop",
        on_class_mismatch: Literal["stop", "ignore"] = "stop",
        channels_last: bool = False,
        compile: Compile = False,  # noqa: A002  # torch's word for it
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
        check_overrides(type(self), DistillationModule)
        # a checkpoint holds plain data, which comes back here
        self.recipe = Recipe(**recipe) if isinstance(recipe, Mapping) else recipe or Recipe()
        given_data = DataInfo(**data) if isinstance(data, Mapping) else data
        self.optimizer_factory = factory_of(optimizer)
        self.scheduler_factory = constant if lr_scheduler is None else factory_of(lr_scheduler)
        self.method: Method = (
            from_description(method) if isinstance(method, Mapping) else method or self.default_method()
        )
        self.guard, self.means = NonFiniteGuard(on_nonfinite), TermMeans()
        self.channels_last, self.compiles = channels_last, compile
        self.matches_classes = on_class_mismatch == "stop"
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) if seed is None else seed
        if not isinstance(self.method, Method) or "_modules" not in vars(self.method):
            named = f"a {type(method).__name__}" if isinstance(method, Method) else repr(method)  # repr reads _modules
            raise ACKDError(
                f"method is {named}; pass an instance, such as KD(), of a class whose constructor calls "
                "super().__init__() first"
            )
        self.absent = absent_specs(teacher)
        configs = () if self.absent else chosen(as_configs(teacher), self.method)
        if self.absent and self.method.teacher == "own":
            raise ACKDError(f"method {type(self.method).__name__} is built from its teachers; {PASS_TEACHER}")
        self.student_config = as_student_config(student)
        if any(each.network is self.student_config.network for each in configs if isinstance(each.network, nn.Module)):
            raise ACKDError("teacher and student are the same network; a frozen teacher cannot learn, pass a copy")

        check_quantization(self.student_config, self.method, self.recipe, compiled=compile)
        self.student, self.start = build_student(self.student_config, self.method.branches, given_data)
        size = 32 if given_data is None else given_data.input_size
        channels = image_channels(self.student)
        if given_data is not None and (given_data.channels or given_data.mean):
            channels = given_data.image_shape[0]  # else those that the network reads
        self.spec: NetSpec = remembered(
            self.student, ("spec", size, channels), lambda: probe(self.student, size, channels=channels)
        )
        self.data = replace(given_data or DataInfo(self.spec.num_classes, size), channels=channels)
        if self.spec.num_classes != self.data.num_classes:
            raise ACKDError(
                f"the student has {self.spec.num_classes} classes and the data have {self.data.num_classes}; make them "
                "equal"
            )
        self._match_start()
        if self.data.num_classes < 2:
            raise ACKDError("the data have 1 class and a classifier needs two; give data of two classes or more")
        self.labelling = Labels(self.recipe, self.data.num_classes)
        self.teachers = Teachers(configs, self.data)
        self.teachers.specs = self.absent or self.teachers.specs
        networks = Networks(
            student=self.spec,
            teachers=self.teachers.specs,
            student_network=self.student,
            teacher_networks=self.teachers.structures,
            pixel_range=self._pixel_range(),
            channels=self.data.image_shape[0],
        )
        try:
            build_method(self.method, networks)
        except IndexError as error:
            if not self.absent:
                raise
            reads = f"method {type(self.method).__name__} reads its teachers' networks in `build`"
            raise ACKDError(f"{reads}; {PASS_TEACHER}") from error
        check_method(self.method)
        check_quantization(self.student_config, self.method, self.recipe, compiled=compile)
        check_labels(self.method, self.recipe, None)
        self.auxiliary = self.method.auxiliary_parameters()
        self.monitors = {}
        # read by torch's DistributedDataParallel
        self._ddp_params_and_buffers_to_ignore = [f"method.{name}" for name in self.method.replicated_buffers]
        if self.auxiliary:
            self.use_manual_optimization()
            say_uncalled(self, DistillationModule)
        self.evaluation = Evaluation(self.spec, self.method)
        self.cache = None
        self.save_hyperparameters(
            as_plain(
                {
                    "student": describe_student(self.student_config, self.student.plain()),
                    "method": describe(self.method),
                    "teacher": describe_specs(self.absent) if self.absent else self._describe_teachers(configs),
                    "data": {
                        key: list(each) if isinstance(each, tuple) else each for key, each in asdict(self.data).items()
                    },
                    "optimizer": describe_factory(optimizer),
                    "lr_scheduler": describe_factory(lr_scheduler),
                    "recipe": asdict(self.recipe),
                    # data modules have a `seed` of their own, and Lightning refuses two values of one name
                    **{name: each for name, each in flags.items() if name != "seed" or each is not None},
                }
            )
        )
        for name, argument in (("student", student), ("optimizer", optimizer), ("lr_scheduler", lr_scheduler)):
            if self.hparams[name] is None and argument is not None:
                self.hparams.pop(name)  # a network, or a function: not plain data
        given = self.__dict__.get("_given")
        for name in [name for name in self.hparams if given is not None and name not in given]:
            self.hparams.pop(name)  # a sub-class passes it on its own

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note which arguments the constructor of a sub-class is given: a checkpoint holds those alone."""
        super().__init_subclass__(**kwargs)
        note_arguments(cls)

    def _describe_teachers(self, configs: Sequence[TeacherConfig]) -> Any:
        """Teachers as plain data: their settings, or the shapes of networks, with which inference needs no teacher."""
        return describe_teachers(configs) or (describe_specs(self.teachers.specs) if configs else None)

    @classmethod
    def from_data(
        cls, data: L.LightningDataModule, student: str | nn.Module | StudentConfig, **arguments: Any
    ) -> DistillationModule:
        """Build a module for the classes, image size and normalisation of a data module.

        Args:
            data: Data module with an attribute ``info`` (`DataInfo`), as all of this package.
            student: Model name, network or `StudentConfig`.
            arguments: Further arguments of the constructor.

        Raises:
            ACKDError: If the data module has no ``info``.
        """
        return cls(student, data=info_of(data), **arguments)

    def default_method(self) -> Method:
        """Return the method of a module that was given none."""
        return CE()

    def _pixel_range(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        if self.data.mean is None or self.data.std is None:
            return None
        pairs = list(zip(self.data.mean, self.data.std, strict=True))
        return tuple(-mean / std for mean, std in pairs), tuple((1 - mean) / std for mean, std in pairs)

    def train(self, mode: bool = True) -> DistillationModule:
        """Set the mode; parts whose parameters are all frozen stay in evaluation mode.

        Args:
            mode: Whether to train rather than to evaluate.
        """
        super().train(mode)
        if mode:
            keep_frozen_in_evaluation(self)
        return self

    def freeze(self) -> DistillationModule:
        """Freeze all parameters, until `unfreeze`."""
        if "_frozen" not in self.__dict__:  # else it is frozen already
            self._frozen = [each for each in self.parameters() if not each.requires_grad]
        super().freeze()
        return self

    def unfreeze(self) -> DistillationModule:
        """Undo `freeze`: parameters that did not learn before it, as those of ``student.freeze``, stay frozen."""
        frozen = self.__dict__.pop("_frozen", [])
        super().unfreeze()
        for each in frozen:
            each.requires_grad_(False)
        return self.train()

    def _apply(self, fn: Any, recurse: bool = True) -> DistillationModule:
        if "teachers" in self.__dict__:
            self.teachers.apply(fn, recurse)
        return cast(DistillationModule, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]


class ACKDModule(DistillationModule):
    """Adversarial collaborative knowledge distillation, ready for any Lightning project.

    A `DistillationModule` whose default method is `ACKD` with the paper's two auxiliary learners and all weights 1.

    Examples:
        >>> from ackd_lightning.models.zoo import create_model
        >>> module = ACKDModule(create_model("resnet8", 10), teacher=create_model("resnet14", 10))
        >>> module.student.specs
        ('D3B1', 'D2B2')
    """

    def default_method(self) -> Method:
        """Return ACKD with the paper's learners and weights."""
        return ACKD()
