"""What a distillation method is: a module that turns two networks' outputs into named, unweighted terms."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.types import Batch, NetOutput, NetSpec


class Method(nn.Module):
    """A distillation method. One file, one class, and it works in every loop of this package.

    A sub-class documents its equations, takes its weights as constructor arguments, and writes ``forward``. What it
    learns itself (projectors, memories) is made in ``build``, when the shapes of both networks are known.

    Attributes:
        needs_teacher: whether the method has a teacher.
        needs_targets: whether the method must know the class of every training image (``set_targets``).
        branches: auxiliary learners that the student has to grow: specs, empty for none, None for the paper's two.
        layers: pairs (n of the student's F_n, n of the teacher's) whose features are compared; shown at the start.
        equal_buffers: names of buffers that the method itself keeps equal in all processes: DDP need not send them.
    """

    needs_teacher: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    layers: tuple[tuple[int, int], ...] = ()
    equal_buffers: ClassVar[tuple[str, ...]] = ()
    branches: tuple[str, ...] | None = ()
    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        """Remember the constructor's arguments, so that a checkpoint can name the method in plain data."""
        method = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs).arguments
        object.__setattr__(method, "init_args", {key: value for key, value in bound.items() if key != "self"})
        return method

    def build(self, student: NetSpec, teacher: NetSpec | None) -> None:
        """Make what depends on shapes; called once, before optimizers and checkpoints.

        Args:
            student: shapes of the student, its branches included.
            teacher: shapes of the teacher, None without one.
        """

    def set_epoch(self, epoch: int) -> None:
        """Tell the method which epoch starts (from 0), for warm-ups.

        Args:
            epoch: the epoch.
        """

    def set_targets(self, targets: Tensor, seed: int = 0) -> None:
        """Take the class of every training image, when a fit begins and before a checkpoint is restored.

        Called when ``needs_targets`` is set.

        Args:
            targets: ``N`` int64 by ``Batch.index``.
            seed: of the run, for what the method draws.
        """

    def set_batch_size(self, size: int) -> None:
        """Take the global batch size, when a fit begins and before optimizers and checkpoints.

        Called when the data module has an attribute ``batch_size``: images of one step in all processes together.

        Args:
            size: of every training batch.
        """

    def observe(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Update memories, after ``forward`` of every training step and without gradient.

        ``forward`` itself changes nothing, so a term can be computed twice.

        Args:
            student: the outputs that ``forward`` had.
            teacher: as there.
            batch: as there.
        """

    def weights(self) -> dict[str, float]:
        """Weight of every term that ``forward`` returns; the loss is their weighted sum."""
        raise NotImplementedError(f"{type(self).__name__} has no method `weights`")

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Unweighted terms of the loss, each a scalar.

        Args:
            student: of this batch, with gradient.
            teacher: of this batch, without gradient; None for a method without a teacher.
            batch: the images with targets and indices.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `forward`")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The method's own trainable parameters as optimizer groups; ``lr_scale`` multiplies the learning rate."""
        own = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"name": "method", "params": own, "lr_scale": 1.0}] if own else []

    def ensemble(self, student: NetOutput) -> Tensor | None:
        """Logits ``B x K`` of the group of learners, for validation; None where there is no group.

        Args:
            student: output with branches.
        """
        return None

    def statistics(self, student: NetOutput) -> dict[str, Tensor]:
        """Numbers worth logging on validation data, without gradient: name (with its ``/``) to scalar.

        Args:
            student: output with branches.
        """
        return {}


class AdversarialMethod(Method):
    """A method with opponents: discriminators are trained first, on detached features, by their own optimizer."""

    discriminators: nn.Module

    def discriminator_terms(self, student: NetOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminators' loss on detached features, and numbers to log.

        Args:
            student: of this batch; no gradient may flow into it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `discriminator_terms`")

    def discriminator_optimizer(self) -> Any:
        """The optimizer of the discriminators' parameters."""
        raise NotImplementedError(f"{type(self).__name__} has no method `discriminator_optimizer`")

    @property
    def has_discriminators(self) -> bool:
        """False when the adversarial part is switched off: then there is nothing to alternate with."""
        return any(True for _ in self.discriminators.parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The method's own parameters, the discriminators' left out."""
        opponents = {id(parameter) for parameter in self.discriminators.parameters()}
        own = [parameter for parameter in self.parameters() if id(parameter) not in opponents]
        return [{"name": "method", "params": own, "lr_scale": 1.0}] if own else []


def describe(method: Method) -> dict[str, Any]:
    """A method as plain data: class path and constructor arguments.

    Args:
        method: to be described.
    """
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in method.init_args.items()}
    return {"class_path": f"{type(method).__module__}.{type(method).__qualname__}", "init_args": plain}


def from_description(description: Mapping[str, Any]) -> Method:
    """Build a method from what ``describe`` wrote.

    Args:
        description: ``class_path`` and ``init_args``.

    Raises:
        ACKDError: when the class path names no ``Method``.
    """
    path = str(description.get("class_path"))
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ACKDError(
            f"the method {path!r} cannot be imported ({error}); install the package it comes from"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ACKDError(f"{path!r} is no distillation method; name a sub-class of ackd_lightning.methods.Method")
    return found(**description.get("init_args", {}))
