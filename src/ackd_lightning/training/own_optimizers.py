"""An overridden ``configure_optimizers``, completed with the optimizers of the method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from ackd_lightning.errors import ACKDError
from ackd_lightning.training.schedule import inner_schedule, parameters_of


def take_assigned(module: Any) -> None:
    """Complete a ``configure_optimizers`` that was assigned to a module, as ``LightningCLI`` does with ``--optimizer``.

    Args:
        module: Training module.
    """
    own = vars(module).get("configure_optimizers")
    if own is not None and getattr(own, "func", None) is not _completed:
        module.configure_optimizers = functools.partial(_completed, module, own)


def _completed(module: Any, own: Callable[[], Any]) -> Any:
    return with_method_optimizers(lambda _: own())(module)


def with_method_optimizers(own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Complete what an overridden ``configure_optimizers`` returns with the optimizers of the method.

    Args:
        own: Method of a training module.
    """

    @functools.wraps(own)
    def configure_optimizers(self: Any) -> Any:
        result = own(self)
        if not self.auxiliary:
            return result
        optimizers, schedules = _parts(result)
        auxiliary = {id(each) for parameters in self.auxiliary.values() for each in parameters}
        held = set(map(id, parameters_of(*optimizers)))
        count = len(optimizers)
        if auxiliary & held and count == 1:  # such as AdamW(self.parameters())
            for group in optimizers[0].param_groups:
                group["params"] = [each for each in group["params"] if id(each) not in auxiliary]
            rank_zero_only(print)(
                f"{type(self).__name__}.configure_optimizers trains all parameters; those of "
                f"{', '.join(self.auxiliary)} have optimizers of the method and are left to them"
            )
            held -= auxiliary
        if auxiliary & held:
            self._follow_student(optimizers, schedules)
            schedules = self._without_monitors(schedules)
        else:
            optimizers, schedules = self.add_method_optimizers(optimizers, schedules)
            rank_zero_only(print)(
                f"{', '.join(self.auxiliary)} of method {type(self.method).__name__}: on the module's own schedule "
                f"{type(_scheduler(schedules[-1])).__name__}, which {type(self).__name__}.configure_optimizers does "
                "not change; give lr_scheduler the one that you return"
            )
        if len(optimizers) != 1 + len(self.auxiliary):
            raise ACKDError(
                f"{type(self).__name__}.configure_optimizers returns {count} optimizers, and method "
                f"{type(self.method).__name__} has {len(self.auxiliary)} of its own, which are added; return the "
                "student's optimizer alone"
            )
        return optimizers, schedules

    configure_optimizers.adds_method_optimizers = True  # type: ignore[attr-defined]
    return configure_optimizers


def _scheduler(schedule: Any) -> Any:
    """Return the schedule of one of Lightning's forms."""
    found = schedule["scheduler"] if isinstance(schedule, Mapping) else schedule
    return inner_schedule(found)


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
