"""The contract of a distillation method: a module that turns the outputs of networks into named, unweighted terms."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.models.heads import SharedClassifiers
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.types import Batch, NetOutput, NetSpec
from ackd_lightning.validation import checked

TeacherAccess = Literal["none", "logits", "output", "own"]
Labels = Literal["hard", "smoothed", "mixed"]
LABELS: tuple[Labels, ...] = get_args(Labels)
"""From the least to the most that a method can learn from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """The networks of a training, as a method sees them in ``build``.

    Attributes:
        student: Shapes of the student and its auxiliary learners.
        teachers: Shapes of every teacher.
        student_network: The student, which maps images to a `NetOutput`.
        teacher_networks: Structures of the teachers. Their weights may be missing (meta device); the teachers with
            their weights come in ``begin_fit``.
        pixel_range: Values of black and of white after normalisation, per channel; None when the normalisation is
            unknown.
        channels: Number of channels of the images.
    """

    student: NetSpec
    teachers: tuple[NetSpec, ...] = ()
    student_network: nn.Module | None = None
    teacher_networks: tuple[nn.Module, ...] = ()
    pixel_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    channels: int = 3

    @property
    def teacher(self) -> NetSpec:
        """Shapes of the first teacher.

        Raises:
            ACKDError: If there is no teacher.
        """
        if not self.teachers:
            raise ACKDError("the method reads a teacher and there is none; pass `teacher` to the training module")
        return self.teachers[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class FitInfo:
    """Information about a fit that starts, as a method sees them in ``begin_fit``.

    Attributes:
        epochs: Number of epochs; None when the fit is not limited by epochs.
        batch_size: Number of images of one step in all processes; None when the data module does not have it.
        targets: Class of every training image by ``Batch.index``, ``N`` int64; None when the data module does not have
            them.
        seed: Seed of the run.
        teachers: The teachers with their weights.
    """

    epochs: int | None = None
    batch_size: int | None = None
    targets: Tensor | None = None
    seed: int = 0
    teachers: tuple[FrozenTeacher, ...] = ()

    def required_targets(self, method: Method) -> Tensor:
        """Return the targets for a method that cannot work without them.

        Args:
            method: The method that needs them, for the message.

        Raises:
            ACKDError: If the data module does not have them.
        """
        if self.targets is None:
            raise ACKDError(
                f"method {type(method).__name__} keeps a row for every training image; give the data module an "
                "attribute `train_targets`, the class of every image by its index, and batches with that index, or "
                "unpack images that are streamed, such as tar shards, into class folders"
            )
        method.reads_index = True
        return self.targets


class Method(nn.Module):
    """Base class of all methods. One file, one class.

    A sub-class takes typed, keyword-only arguments, sets ``loss_weights`` in its constructor and writes ``forward``.
    The training module calls the hooks in this order: ``build`` once, when the networks exist; ``begin_fit`` when a
    fit starts, before a checkpoint is restored; then for every batch ``set_epoch``, ``auxiliary_loss`` of each
    auxiliary optimizer, ``forward``, and after the backward pass ``update``.

    Arguments of the constructor are checked against their annotations (`Literal` choices, and ranges such as
    ``ackd_lightning.validation.Positive``) in Python and on the command line alike.

    Attributes:
        teacher: Part of the teacher that the method reads: ``none``, its ``logits``, the whole ``output`` with
            features, or ``own`` for a method that runs one or several teachers itself; its ``forward`` gets None.
        loss_weights: Weight of every term that ``forward`` returns. The loss is their weighted sum. May change in
            ``set_epoch``.
        branches: Auxiliary learners of the student: ``DnBm`` branches, ``last``, ``peer`` or names of models; empty
            for none, None for the two of the ACKD paper.
        labels: Labels that the method can learn from. ``hard``: it reads ``batch.target`` alone. ``smoothed``: its
            cross-entropies read ``batch.labels``, and it needs the class or the index of every image besides.
            ``mixed``: it needs neither, so images may be mixtures of two.
        layers: Pairs (n, m) of the student's F_n and the teacher's F_m that are compared; printed when a fit starts.
        head: Replaces the student's own classifier in predictions and in the export.
        lr_scales: Learning rate of a sub-module's parameters relative to the student's, by name of the sub-module.
        compile_modules: Names of sub-modules that are worth compiling.
        raw_classes: Whether the method reads a teacher's own classes, which cannot be matched with those of the data.
        random_by_index: Whether the method draws random numbers for every image by its index.
        whole_batches: Whether every training batch must have the data's batch size; the rest of an epoch is left out.
        fit_modules: Names of sub-modules that only a fit or a checkpoint fills.
        replicated_buffers: Names of buffers that the method itself keeps equal in all processes, so that DDP does not
            have to broadcast them.
    """

    teacher: TeacherAccess = "output"
    labels: Labels = "hard"
    loss_weights: dict[str, float]
    branches: tuple[str, ...] | None = ()
    layers: tuple[tuple[int, int], ...] = ()
    head: SharedClassifiers | None
    lr_scales: Mapping[str, float] = {}
    compile_modules: tuple[str, ...] = ()
    raw_classes: bool = False
    random_by_index: bool = False
    whole_batches: bool = False
    fit_modules: tuple[str, ...] = ()
    replicated_buffers: tuple[str, ...] = ()
    init_args: dict[str, Any]
    reads_index: bool = False  # set when the method asks for the targets of a fit

    def __new__(cls, *args: Any, **kwargs: Any) -> Method:
        """Keep the constructor's arguments, so that a checkpoint can name the method in plain data."""
        method = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            bound = signature.bind_partial(None, *args, **kwargs).arguments
        except TypeError as error:
            unknown = [name for name in kwargs if name not in signature.parameters]
            known = [name for name in signature.parameters if name != "self"]
            hint = f"; {near_matches(unknown[0], known)}" if unknown else "; pass arguments by name"
            raise ACKDError(f"method {cls.__name__} {error}{hint}") from error
        given: dict[str, Any] = {}
        for key, value in bound.items():
            if signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
                given |= value
            elif key != "self":
                given[key] = value
        object.__setattr__(method, "init_args", given)
        return method

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the arguments of every constructor, also of one that a sub-class calls."""
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    def __init__(self) -> None:
        super().__init__()
        self.head = None  # in the class it would hide a sub-module of that name
        self.loss_weights = {}

    # ---------------------------------------------------------------- hooks

    def build(self, networks: Networks) -> None:
        """Create what depends on the networks, such as projectors.

        Args:
            networks: Shapes and structures of student and teachers.
        """

    def begin_fit(self, fit: FitInfo) -> None:
        """Create what depends on the data and the length of the training, such as memories.

        Args:
            fit: Information about the fit.
        """

    def set_epoch(self, epoch: int) -> None:
        """Change what depends on the epoch. Called before every batch.

        Args:
            epoch: Number of the epoch, from 0.
        """

    def forward(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> dict[str, Tensor]:
        """Return unweighted scalar terms by name, without changing the method.

        Args:
            student: Output of the student.
            teacher: Output of the teacher; None for ``teacher = "none"`` and ``"own"``. With ``"logits"`` its features
                may be None.
            batch: Images, targets and indices.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `forward`")

    def update(self, student: NetOutput, teacher: NetOutput | None, batch: Batch) -> None:
        """Update memories after the backward pass of a training step, without gradient.

        Args:
            student: Output that ``forward`` read.
            teacher: Output that ``forward`` read.
            batch: Images, targets and indices.
        """

    def auxiliary_optimizers(self) -> dict[str, Optimizer]:
        """Return the optimizers of parameters with training steps of their own, in the order of these steps.

        Discriminators and generators are such parameters. Each has a step in every batch before the student's, and is
        frozen in the student's step. The names are those of the logged learning rates, ``lr/NAME``. A parameter group
        with the entry ``lr_scale`` is trained at that multiple of the student's largest learning rate where both
        optimizers are SGD, whose rates can be compared, and else at the rate that it has.
        """
        return {}

    def auxiliary_loss(
        self, name: str, student: NetOutput, teacher: NetOutput | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Return the loss of one auxiliary optimizer's step and values to log, or None for no step (in all processes).

        Gradients may reach the parameters of that optimizer only. Values are logged as ``train/KEY``.

        Args:
            name: Name of the optimizer.
            student: Output of the student, with the graph of the student's step: detach it.
            teacher: Output of the teacher, as in ``forward``.
            batch: Images, targets and indices.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `auxiliary_loss`")

    # ---------------------------------------------------------------- optional, for evaluation

    def ensemble(self, student: NetOutput) -> Tensor | None:
        """Return logits ``B x K`` of the method's own group of learners, or None without one.

        Args:
            student: Output of the student.
        """
        return None

    def statistics(self, student: NetOutput) -> dict[str, Tensor]:
        """Return scalars to log on validation data, as ``val/KEY``.

        Args:
            student: Output of the student.
        """
        return {}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Give empty buffers the shape in the checkpoint: without a fit, nothing has created the memories."""
        for name, buffer in self._buffers.items():
            stored = state_dict.get(f"{prefix}{name}")
            if buffer is not None and buffer.numel() == 0 and isinstance(stored, Tensor):
                setattr(self, name, buffer.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---------------------------------------------------------------- helpers

    def keep_outside(self, name: str, value: Any) -> None:
        """Set an attribute that is not a sub-module: not in the state dict, no optimizer, and not moved.

        Args:
            name: Name of the attribute.
            value: Usually a network that somebody else owns.
        """
        object.__setattr__(self, name, value)

    def auxiliary_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters of every auxiliary optimizer by its name."""
        return {
            name: [each for group in optimizer.param_groups for each in group["params"]]
            for name, optimizer in self.auxiliary_optimizers().items()
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters that the student's optimizer trains, with ``name`` and ``lr_scale`` of every group."""
        auxiliary = {id(each) for parameters in self.auxiliary_parameters().values() for each in parameters}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) not in auxiliary:
                owner = next((each for each in self.lr_scales if name.startswith(f"{each}.")), "method")
                groups.setdefault(owner, []).append(parameter)
        return [
            {"name": owner, "params": parameters, "lr_scale": self.lr_scales.get(owner, 1.0)}
            for owner, parameters in groups.items()
        ]


def check_method(method: Method) -> None:
    """Refuse what a method says about itself and does not keep, after ``build``.

    Args:
        method: Method that was built.

    Raises:
        ACKDError: Naming the attribute.
    """
    name = type(method).__name__
    for each, parameter in method.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ACKDError(f"{each} of method {name} is lazy; create it in `build`, with the shapes in `networks`")
    if method.teacher not in get_args(TeacherAccess):
        choices = ", ".join(get_args(TeacherAccess))
        raise ACKDError(f"teacher is {method.teacher!r} in method {name}; it must be one of {choices}")
    if method.labels not in LABELS:
        raise ACKDError(f"labels is {method.labels!r} in method {name}; it must be one of {', '.join(LABELS)}")
    children = {each for each, _ in method.named_modules()}
    buffers = {each for each, _ in method.named_buffers()} | {each for each, _ in _declared_buffers(method)}
    for attribute, names, known, kind in (
        ("lr_scales", method.lr_scales, children, "sub-module"),
        ("compile_modules", method.compile_modules, children, "sub-module"),
        ("replicated_buffers", method.replicated_buffers, buffers, "buffer"),
    ):
        for each in names:
            if each not in known:
                raise ACKDError(f"{attribute} names {each!r} and method {name} has no such {kind}; correct the name")


def _declared_buffers(method: nn.Module) -> Iterator[tuple[str, None]]:
    """Names of buffers that are None until a fit begins."""
    for prefix, module in method.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                yield f"{prefix}.{name}".lstrip("."), None


def weighted_loss(method: Method, terms: Mapping[str, Tensor]) -> Tensor:
    """Return the weighted sum of a method's terms.

    Args:
        method: Method with a weight for every term.
        terms: Unweighted scalars by name.

    Raises:
        ACKDError: If the terms are not scalars by name, or terms and weights do not have the same names.
    """
    name, weights = type(method).__name__, method.loss_weights
    if not isinstance(terms, Mapping):
        raise ACKDError(f"forward of method {name} returns a {type(terms).__name__}; return scalar terms by name")
    if "loss" in terms or "loss_step" in terms:
        raise ACKDError(f"method {name} calls a term `loss`, which is the weighted sum in logs; give it another name")
    if terms.keys() != weights.keys():
        without, extra = (
            [each for each in terms if each not in weights],
            [each for each in weights if each not in terms],
        )
        problem = f"term {without[0]!r} has no weight" if without else f"weight {extra[0]!r} has no term"
        raise ACKDError(
            f"{problem} in method {name}, whose loss_weights are {', '.join(weights) or 'empty'}; name every term that "
            "forward returns, and no other"
        )
    for term, value in terms.items():
        if not isinstance(value, Tensor) or value.ndim:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ACKDError(f"term {term!r} of method {name} is {found}; it must be a tensor without dimensions")
    return torch.stack([weights[term] * value for term, value in terms.items()]).sum()


def is_task_term(name: str) -> bool:
    """Return whether a term learns from the labels rather than from another network: ``ce``, ``ce_aux``, ``ce_2``, ...

    Args:
        name: Name of the term.
    """
    return name == "ce" or name.startswith("ce_")


def features_of(output: NetOutput) -> tuple[Tensor, ...]:
    """Return the features of an output whose network is known to offer them (checked in ``build``).

    Args:
        output: Output of a network.
    """
    assert output.features is not None
    return output.features


def embedding_of(output: NetOutput) -> Tensor:
    """Return the embedding of an output whose network is known to offer it (checked in ``build``).

    Args:
        output: Output of a network.
    """
    assert output.embedding is not None
    return output.embedding
