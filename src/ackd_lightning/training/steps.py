"""The steps of a training module: from a batch to the loss, and the forward pass of the network that is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ackd_lightning.callbacks.length import epochs_of_fit
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import weighted_loss
from ackd_lightning.models.copies import dtype_of
from ackd_lightning.models.quantization import FakeQuantized, ranges_fixed
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.random import mix, seed_device
from ackd_lightning.training.arguments import refuse_late_parameters
from ackd_lightning.training.batches import check_index, read_batch
from ackd_lightning.training.checkpointing import SelfDescribing
from ackd_lightning.training.evaluation import EvaluationSteps
from ackd_lightning.training.labels import check_batch
from ackd_lightning.training.overrides import check_outermost
from ackd_lightning.training.speed import begin_step
from ackd_lightning.training.students import check_trained
from ackd_lightning.training.teacher_cache import TeacherCache
from ackd_lightning.types import Batch, NetOutput, NetSpec


class TrainingSteps(SelfDescribing, EvaluationSteps):
    """Training on batches of any data module.

    Attributes:
        channels_last: Whether images are laid out with channels last.
        cache: Logits of the teacher; None where it is run.
    """

    channels_last: bool
    cache: TeacherCache | None
    _built: frozenset[int] | None = None
    _last: tuple[NetOutput, NetOutput | None, Batch] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a network under the name of a property, which would hide it."""
        if isinstance(value, nn.Module) and isinstance(getattr(type(self), name, None), property):
            given = " (pass it to the constructor)" if name == "teacher" else ""
            raise ACKDError(f"{name} is a property of {type(self).__name__}; assign the network to another name{given}")
        super().__setattr__(name, value)

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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the networks' own noise by (seed, epoch, batch, rank), so that a resumed run draws the same."""
        self._last = None  # of a step without a backward pass, whose graph takes memory
        if not self.automatic_optimization:
            self.rearm_buffer_broadcast()
        if isinstance(backbone := self.student.backbone, FakeQuantized):
            backbone.fixed_ranges = ranges_fixed(self.current_epoch, epochs_of_fit(self.trainer))
        self.method.set_epoch(self.current_epoch)  # here and not at an epoch's start, which a resumed run skips
        seed_device(mix(self.seed, self.current_epoch, batch_idx, self.global_rank), self.device)

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

    def as_batch(self, batch: Any, *, first: bool = False, targets: bool = True) -> Batch:
        """Read the batch of a step, as `read_batch` does; images get the floating-point type of the student's weights.

        Args:
            batch: Batch of any data module.
            first: Whether it is the first of an epoch, whose targets are checked on a GPU, too.
            targets: Whether targets are needed.

        Raises:
            ACKDError: If it has another form than the module was built for.
        """
        check_outermost(self)
        begin_step(self.compiles, self.device)
        unlabelled = self.labelling.unlabelled or not self.training
        result = read_batch(batch, self.data, check=first, unlabelled=unlabelled, targets=targets)
        image = result.image.to(dtype_of(self.student))
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return result._replace(image=image)

    def outputs(self, batch: Batch) -> tuple[NetOutput, NetOutput | None]:
        """Run teacher and student once; a method that runs its teachers itself gets None.

        Args:
            batch: Images.
        """
        if self.cache is not None:
            known = self.cache.read(self.current_epoch, batch.index)
            if not self.cache.compared:
                with torch.compiler.set_stance("force_eager"):  # once, which is not worth a compilation
                    self.cache.compare(known.logits, self.teachers(batch.image).logits)
            return self.student(batch.image), known
        runs = self.teacher is not None and self.method.teacher != "own"
        teacher = self.teachers(batch.image) if runs else None
        return self.student(batch.image), teacher

    def training_parameters(self) -> int:
        """Return the number of parameters that learn, of the student with its learners and of the method."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad)

    def networks_in_training(self) -> tuple[nn.Module, ...]:
        """Return student and method."""
        return self.student, self.method

    def on_train_start(self) -> None:
        """Refuse a student of weights that nothing trained, where the recipe needs trained ones."""
        super().on_train_start()
        check_trained(self.student, self.student_config, self.start or self._started_from)  # a checkpoint is loaded now
        self._built = frozenset(map(id, self.method.parameters()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Train on one batch.

        Returns:
            The weighted loss, 0 for a skipped batch; None with manual optimization.
        """
        batch = self.as_batch(batch, first=batch_idx == 0)
        check_batch(self.method, batch)
        self._shares, batch = batch.soft, self.labelling(batch)
        if batch_idx == 0:
            check_index(self.method, batch, starts=self.global_step == 0)
        try:
            loss = self._step(batch)
        except ValueError as error:  # BatchNorm's
            if len(batch.target) > 1 or "more than 1 value" not in str(error):
                raise
            raise ACKDError(
                f"a batch has 1 image and BatchNorm needs more to train ({error}); set drop_last=True in your "
                "DataLoader, or choose a batch size that leaves more than 1 image over"
            ) from error
        if batch_idx == 0 and self._built is not None:
            refuse_late_parameters(self.method, self._built)
        return loss

    def _step(self, batch: Batch) -> Tensor | None:
        if not self.automatic_optimization:
            self.manual_step(batch)
            return None
        before = self.statistics_before()
        student, teacher = self.outputs(batch)
        terms = self.method(student, teacher, batch)
        loss = weighted_loss(self.method, terms)
        if self.skips({**terms, "loss": loss}, before):
            return torch.zeros_like(loss)  # without a backward pass: Lightning refuses None with several processes
        self.split_gradient(terms)
        self._last = student, teacher, batch
        self.log_terms(loss, terms, student, batch)
        return loss

    def on_train_epoch_end(self) -> None:
        """Forget a step that had no backward pass, as in the last epoch of Lightning's average: no graph is copied."""
        super().on_train_epoch_end()
        self._last = None

    def on_after_backward(self) -> None:
        """Update the method's memories."""
        if self._last is not None and self.automatic_optimization:
            self.update_memories(*self._last)
            self._last = None
