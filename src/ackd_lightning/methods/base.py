"""What a distillation method is: a module that turns two networks' outputs into named, unweighted terms."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.heads import SharedClassifiers
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.types import Batch, NetOutput, NetSpec

Teacher = TypeVar("Teacher")


@dataclass(frozen=True, slots=True)
class Examples:
    """Images and what a method has made of them.

    Attributes:
        original: ``B x C x H x W`` as the networks get them.
        made: of equal shape.
        predictions: by name of the network, ``2 x B`` int64: its answers to the originals and to what was made.
        target: ``B`` int64.
    """

    original: Tensor
    made: Tensor
    predictions: Mapping[str, Tensor]
    target: Tensor


class Method(nn.Module):
    """A distillation method. One file, one class, and it works in every loop of this package.

    A sub-class documents its equations, takes its weights as constructor arguments, and writes ``forward``. What it
    learns itself (projectors, memories) is made in ``build``, when the shapes of both networks are known.

    Attributes:
        needs_teacher: whether the method has a teacher.
        needs_targets: whether the method must know the class of every training image (``set_targets``).
        takes_teachers: whether the method runs the teachers itself (``adopt``), copies of its own for example: then
            ``forward`` is handed no output of a teacher, and there may be several teachers.
        teacher_logits_suffice: whether ``forward`` reads nothing of the teacher but its logits, so that they may come
            from a cache.
        branches: auxiliary learners that the student has to grow: specs, empty for none, None for the paper's two.
        layers: pairs (n of the student's F_n, n of the teacher's) whose features are compared; shown at the start.
        networks: names of sub-modules that are networks trained beside the student: like the student's own, the
            running statistics of their BatchNorm move in every forward pass.
        worth_compiling: names of sub-modules that cost something in every step and are called as modules.
        makes_examples: whether ``examples`` has something to show.
        teacher_specs: shapes of all teachers, set before ``build``.
        head: what stands between the student's features and the predictions when it is no longer the student's own
            classifier; kept with the student and exported with it.
        equal_buffers: names of buffers that the method itself keeps equal in all processes: DDP need not send them.
    """

    needs_teacher: bool = True
    needs_targets: bool = False
    takes_teachers: bool = False
    teacher_logits_suffice: bool = False
    makes_examples: bool = False
    networks: tuple[str, ...] = ()
    worth_compiling: tuple[str, ...] = ()
    teacher_specs: tuple[NetSpec, ...] = ()
    head: SharedClassifiers | None
    layers: tuple[tuple[int, int], ...] = ()
    equal_buffers: tuple[str, ...] = ()
    branches: tuple[str, ...] | None = ()
    init_args: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        """Remember the constructor's arguments, so that a checkpoint can name the method in plain data."""
        method = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(None, *args, **kwargs).arguments
        object.__setattr__(method, "init_args", {key: value for key, value in bound.items() if key != "self"})
        return method

    def __init__(self) -> None:
        super().__init__()
        self.head = None  # not in the class, where it would hide a sub-module of that name

    def keep_outside(self, name: str, value: Any) -> None:
        """Set an attribute that is no sub-module: in no state, no optimizer, not moved along.

        Args:
            name: of the attribute.
            value: a network that belongs to somebody else.
        """
        object.__setattr__(self, name, value)

    def choose_teachers(self, given: Sequence[Teacher]) -> Sequence[Teacher]:
        """The teachers that the method needs: none for a method that needs none, whatever is given.

        Args:
            given: names or networks.

        Raises:
            ACKDError: for none where one is needed, and for several where one is.
        """
        name = type(self).__name__
        if not self.needs_teacher:
            return ()
        if not given:
            raise ACKDError(
                f"method {name} needs a teacher and `teacher` is empty; name a model and its weight file, or pass a "
                "network"
            )
        if len(given) > 1 and not self.takes_teachers:
            raise ACKDError(f"method {name} learns from one teacher and `teacher` names {len(given)}; name one of them")
        return given

    def attach(self, student: nn.Module, teachers: Sequence[nn.Module]) -> None:
        """Take the networks themselves, once, before ``build``; for methods that run or copy them.

        Args:
            student: maps images to a ``NetOutput`` with all learners; hold it with ``keep_outside``.
            teachers: structures of the teachers' networks, whose weights may be missing (on the meta device): those
                come with ``adopt``.
        """

    def adopt(self, teachers: Sequence[FrozenTeacher]) -> None:
        """Take the teachers with their weights, when a fit begins and before a checkpoint is restored.

        Args:
            teachers: in the order of ``attach``.
        """

    def build(self, student: NetSpec, teacher: NetSpec | None) -> None:
        """Make what depends on shapes; called once, before optimizers and checkpoints.

        Args:
            student: shapes of the student, its branches included.
            teacher: shapes of the teacher, None without one.
        """

    def set_range(self, low: Sequence[float], high: Sequence[float]) -> None:
        """Take the smallest and the largest value of an image, per channel, as the data normalise it.

        Called in the training module's constructor, before ``build``, when the normalisation is known.

        Args:
            low: of black.
            high: of white.
        """

    def set_total_epochs(self, epochs: int) -> None:
        """Take the length of the training, when a fit begins and before a checkpoint is restored.

        Called when it is limited by a number of epochs.

        Args:
            epochs: E, at least 1.
        """

    def set_epoch(self, epoch: int) -> None:
        """Tell the method the epoch, before every batch, for warm-ups and for what changes once an epoch.

        Args:
            epoch: from 0.
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

    def prediction(self, student: NetOutput) -> Tensor:
        """Logits ``B x K`` of the network that is kept: through ``head`` where there is one.

        Args:
            student: of the images.
        """
        if self.head is None:
            return student.logits
        logits: Tensor = self.head(student.features[-1])
        return logits

    def ensemble(self, student: NetOutput) -> Tensor | None:
        """Logits ``B x K`` of the group of learners, for validation; None where there is no group.

        Args:
            student: output with branches.
        """
        return None

    def statistics(self, student: NetOutput) -> dict[str, Tensor]:
        """Numbers worth logging on validation data, without gradient: name (with its ``/``) to scalar.

        Args:
            student: of the images.
        """
        return {}

    def examples(self, batch: Batch) -> Examples | None:
        """Images that the method has made of a batch's, to be looked at; None for a method that makes none.

        Args:
            batch: of validation data.
        """
        return None


class AdversarialMethod(Method):
    """A method with further players: parameters that are trained in steps of their own, by their own optimizers.

    In every batch the student is run once; then the players' steps are made, in the order of ``players``, and the
    learners' step comes last, with the players' parameters frozen. Discriminators are such players, a generator is
    another; a player may also be a single tensor of a network whose rest learns in the learners' step.
    """

    def players(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by player, in the order of their steps; empty when the game is switched off.

        The name is shown with the learning rate (``lr-NAME``).
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `players`")

    def player_loss(
        self, player: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Loss of a player and numbers to log by name; None when the player sits this step out (in all processes).

        Gradients may reach that player's parameters only. The numbers are tensors on the batch's device; there may be
        none.

        Args:
            player: its name.
            student: of this batch, with the graph that the learners' step goes back through: to be detached.
            teacher: of this batch.
            batch: images and targets.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `player_loss`")

    def player_optimizer(self, player: str) -> torch.optim.Optimizer:
        """The optimizer of a player's parameters.

        Args:
            player: its name.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `player_optimizer`")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The method's own parameters, the players' left out."""
        players = {id(parameter) for parameters in self.players().values() for parameter in parameters}
        own = [each for each in self.parameters() if each.requires_grad and id(each) not in players]
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
