r"""DOT. Zhao, Cui, Song, Liang: DOT: A Distillation-Oriented Trainer, ICCV 2023.

The gradient of the task (cross-entropies with the labels, weight decay included) and that of the distillation have a
momentum each, \(\mu - \Delta\) and \(\mu + \Delta\):

\(v_{task} \leftarrow (\mu - \Delta)\,v_{task} + g_{task},\quad v_{kd} \leftarrow (\mu + \Delta)\,v_{kd} + g_{kd},\quad
\theta \leftarrow \theta - \mathrm{lr}\,(v_{task} + v_{kd})\)

Parameters that only one of the two reaches, such as projectors, have the momentum \(\mu\), as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import Method, is_task_term
from ackd_lightning.training.manual import ManualSteps
from ackd_lightning.training.means import average_over_processes
from ackd_lightning.training.schedule import parameters_of
from ackd_lightning.training.speed import GRAPHS, Compile
from ackd_lightning.validation import NonNegative, Range, check_arguments


class DOT(Optimizer):
    """SGD with one momentum for the gradient of the task and another one for that of the distillation.

    The training module runs two backward passes in a step. Without `keep_distillation` it is SGD with momentum.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        momentum: Momentum mu; 0.9 for the authors.
        delta: Half the difference Delta of both momenta, at most ``momentum`` and 1 - ``momentum``. For the authors
            0.075 on CIFAR-100 and 0.09 on ImageNet.
        weight_decay: Weight decay, part of the gradient of the task.

    Raises:
        ACKDError: If a value is not allowed.

    Examples:
        >>> weight = nn.Parameter(torch.zeros(1))
        >>> optimizer = DOT([weight], lr=1.0, momentum=0.5, delta=0.25)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     weight.grad = torch.tensor([3.0])  # of which 2 are distillation
        ...     optimizer.keep_distillation({weight: torch.tensor([2.0])}, task={weight})
        ...     optimizer.step()
        >>> weight.item()  # -(1 + 2) - (1.25 + 3.5)
        -7.75
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: NonNegative = 0.1,
        momentum: NonNegative = 0.9,
        delta: NonNegative = 0.075,
        weight_decay: NonNegative = 0.0,
    ) -> None:
        arguments = {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay}
        check_arguments(DOT, arguments)
        if delta not in Range(0, min(momentum, 1 - momentum)):
            raise ACKDError(
                f"delta is {delta} in DOT and momentum {momentum}; momentum - delta and momentum + delta must both be "
                "from 0 to 1"
            )
        super().__init__(params, arguments)
        self._distillation: dict[nn.Parameter, Tensor] = {}
        self._task: Set[nn.Parameter] = set()

    def keep_distillation(self, gradients: Mapping[nn.Parameter, Tensor], *, task: Set[nn.Parameter]) -> None:
        """Keep the part of the next step's gradients that comes from the distillation, added to what is kept already.

        Args:
            gradients: Gradient of the distillation by parameter; without parameters that it does not reach.
            task: Parameters that the task reaches.
        """
        self._task = task
        for parameter, gradient in gradients.items():
            kept = self._distillation.get(parameter)
            self._distillation[parameter] = gradient if kept is None else kept + gradient

    @torch.no_grad()
    def scale_distillation(self, factor: Tensor) -> None:
        """Multiply what is kept by a factor, as gradient clipping does with the whole gradients.

        Args:
            factor: Scalar.
        """
        for gradient in self._distillation.values():
            gradient.mul_(factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, also those that are kept.

        Args:
            set_to_none: Whether to set the gradients to None rather than to 0.
        """
        super().zero_grad(set_to_none)
        self._distillation = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: Function that computes the gradients and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            reached = [each for each in group["params"] if each.grad is not None]
            both = [each for each in reached if each in self._distillation and each in self._task]
            parts = set(both)
            self._step(group, [each for each in reached if each not in parts], [])
            self._step(group, both, [self._distillation[each] for each in both])
        self._distillation = {}
        return loss

    def _step(self, group: dict[str, Any], parameters: list[Tensor], distillation: list[Tensor]) -> None:
        """Step parameters that both gradients reach, or, without the second list, parameters that one reaches."""
        if not parameters:
            return
        task = [each.grad for each in parameters if each.grad is not None]
        if distillation:
            task = list(torch._foreach_sub(task, distillation))
        if group["weight_decay"]:
            task = list(torch._foreach_add(task, parameters, alpha=group["weight_decay"]))
        delta = group["delta"] if distillation else 0.0
        for name, gradients, momentum in (
            ("task_momentum", task, group["momentum"] - delta),
            ("distillation_momentum", distillation, group["momentum"] + delta),
        ):
            if not gradients:
                continue
            velocities = self._velocities(name, parameters)
            torch._foreach_mul_(velocities, momentum)
            torch._foreach_add_(velocities, gradients)
            torch._foreach_add_(parameters, velocities, alpha=-group["lr"])

    def _velocities(self, name: str, parameters: Sequence[Tensor]) -> list[Tensor]:
        for each in parameters:
            if name not in self.state[each]:
                self.state[each][name] = torch.zeros_like(each, memory_format=torch.preserve_format)
        return [self.state[each][name] for each in parameters]


def check_dot(method: Method, *, manual: Iterable[str], trainer_clips: bool, graphs: bool) -> None:
    """Refuse a fit with `DOT` that does not have two gradients in one step.

    Args:
        method: The method.
        manual: Names of its auxiliary optimizers.
        trainer_clips: Whether the Trainer clips gradients by itself.
        graphs: Whether networks run as CUDA graphs.

    Raises:
        ACKDError: Naming the reason.
    """
    name = type(method).__name__
    if names := list(manual):
        raise ACKDError(
            f"optimizer DOT splits the gradient of automatic optimization and method {name} trains {', '.join(names)} "
            "with optimizers of its own; use torch.optim.SGD"
        )
    if trainer_clips:
        raise ACKDError(
            "trainer.gradient_clip_val does not know the two gradients of optimizer DOT; set "
            "model.recipe.gradient_clip_val instead"
        )
    if graphs:
        raise ACKDError(
            f"optimizer DOT runs the backward pass twice and model.compile is {GRAPHS}, whose graphs run it once; set "
            "model.compile to true"
        )
    weights = method.loss_weights
    task = [each for each, weight in weights.items() if weight and is_task_term(each)]
    distillation = [each for each, weight in weights.items() if weight and not is_task_term(each)]
    if not task or not distillation:
        missing = "of distillation" if task else "with the labels (ce)"
        raise ACKDError(
            f"optimizer DOT needs terms with the labels and terms of distillation, and method {name} has no term "
            f"{missing} with a weight above 0; use torch.optim.SGD"
        )


def gradients_of(loss: Tensor, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of a loss by parameter, without those that it does not reach; its graph is kept.

    Args:
        loss: Scalar.
        parameters: Trainable parameters.
    """
    if not loss.requires_grad:  # constant terms, as before a warm-up
        return {}
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {each: gradient for each, gradient in zip(parameters, found, strict=True) if gradient is not None}


class TwoGradients(ManualSteps):
    """A module that computes the gradient of the distillation apart where its optimizer is `DOT`.

    Attributes:
        compiles: Whether the networks are compiled, and how.
    """

    compiles: Compile
    _dot: DOT | None = None
    _distillation: Tensor | None = None
    _task_terms: frozenset[str] = frozenset()
    _task_reaches: frozenset[nn.Parameter] = frozenset()

    def begin_split(self) -> None:
        """Prepare a fit with `DOT`."""
        optimizer = self.trainer.optimizers[0] if self.trainer.optimizers else None
        self._dot = optimizer if isinstance(optimizer, DOT) else None
        self._task_terms, self._task_reaches, self._distillation = frozenset(), frozenset(), None
        if self._dot is not None:
            check_dot(
                self.method,
                manual=self.auxiliary,
                trainer_clips=bool(self.trainer.gradient_clip_val),
                graphs=self.compiles == GRAPHS,
            )
            torch._functorch.config.donated_buffer = False  # compiled networks keep their graph for a second pass

    def split_gradient(self, terms: Mapping[str, Tensor]) -> None:
        """Keep the loss of the distillation until the backward pass, where the optimizer has a momentum for it.

        Args:
            terms: Unweighted scalars by name.
        """
        if self._dot is None:
            return
        weights = self.method.loss_weights
        self._distillation = torch.stack(
            [weights[name] * term for name, term in terms.items() if not is_task_term(name)]
        ).sum()
        task = {name: term for name, term in terms.items() if is_task_term(name) and term.requires_grad}
        if task.keys() != self._task_terms:  # also when a term starts or ends
            loss = sum((weights[name] * term for name, term in task.items()), torch.zeros(()))
            self._task_terms, self._task_reaches = frozenset(task), frozenset(gradients_of(loss, self._trained()))

    def _trained(self) -> list[nn.Parameter]:
        assert self._dot is not None
        return [each for each in parameters_of(self._dot) if each.requires_grad]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, after that of the distillation alone where the optimizer has a momentum for it."""
        if self._dot is not None and self._distillation is not None and not self.guard.skipping:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            distillation = self._distillation / self.trainer.accumulate_grad_batches
            found = gradients_of(distillation if scaler is None else scaler.scale(distillation), self._trained())
            if scaler is not None:
                scale = scaler.scale(torch.ones_like(distillation))
                found = {each: gradient / scale for each, gradient in found.items()}
            if self.trainer.world_size > 1:
                average_over_processes([*found.values()])  # as DDP does with the whole gradients
            self._dot.keep_distillation(found, task=self._task_reaches)
        self._distillation = None
        super().backward(loss, *args, **kwargs)
