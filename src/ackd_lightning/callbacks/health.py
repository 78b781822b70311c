"""Alarms: a teacher that knows nothing, attention or features that collapse, a disk that is too small."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics.classification import MulticlassAccuracy

from ackd_lightning.config.files import packaged_names
from ackd_lightning.errors import ACKDError

if TYPE_CHECKING:
    from ackd_lightning.callbacks.protocol import TrainingModule
    from ackd_lightning.models.teacher import FrozenTeacher



def is_dry(trainer: L.Trainer) -> bool:
    """True under ``fast_dev_run``, which only tries the wiring.

    Args:
        trainer: of the run.
    """
    return bool(getattr(trainer, "fast_dev_run", False))


class TeacherGate(L.Callback):
    """Test the teacher on validation data before the first step.

    Args:
        stop: end the run when the teacher is near chance or far below what its file says; else warn.
    """

    def __init__(self, *, stop: bool = True) -> None:
        self.stop = stop

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, print, log, judge every teacher."""
        module = cast("TrainingModule", pl_module)
        if is_dry(trainer) or not trainer.enable_validation:
            return
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        if trainer.val_dataloaders is None:
            return
        for number, teacher in enumerate(module.teachers.frozen):
            self._examine(trainer, module, teacher, str(number + 1) if number else "")

    @torch.no_grad()
    def _examine(self, trainer: L.Trainer, module: TrainingModule, teacher: FrozenTeacher, suffix: str) -> None:
        loaders = trainer.val_dataloaders
        accuracy = MulticlassAccuracy(module.data.num_classes, average="micro").to(module.device)
        seen = 0
        every = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        for raw in itertools.chain(*every):
            batch = module.as_batch(trainer.strategy.batch_to_device(raw))
            with trainer.precision_plugin.forward_context():
                accuracy.update(teacher(batch.image).logits, batch.target)
            seen += batch.target.numel()
        stage = "test" if module.looks_at_test() else "validation"
        measured = float(accuracy.compute())
        teacher.metadata["measured_acc"] = f"{measured:.6f}"
        name = teacher.metadata.get("model", type(teacher.network).__name__)
        if trainer.is_global_zero:
            print(f"teacher {name}: accuracy {measured:.2%} on this run's {stage} data", flush=True)
        key = f"{'test' if module.looks_at_test() else 'val'}/teacher{suffix}_acc"
        for logger in trainer.loggers:
            logger.log_metrics({key: measured}, step=trainer.global_step)
        problem = self.judge(measured, module.data.num_classes, teacher.metadata, seen)
        if problem is None:
            return
        sentence = f"teacher {name} {problem}; check its weight file, normalisation and class order"
        if self.stop:
            raise ACKDError(f"{sentence}, or pass --model.teacher.gate warn")
        rank_zero_warn(sentence)

    @staticmethod
    def judge(measured: float, num_classes: int, metadata: dict[str, str], seen: int) -> str | None:
        """Say what is wrong with a teacher's accuracy, None when nothing is.

        Args:
            measured: accuracy in [0, 1].
            num_classes: K.
            metadata: of the weight file.
            seen: number of images; few images widen the tolerance.
        """
        chance = 1.0 / num_classes
        if measured < chance + 0.05 * (1.0 - chance):
            return f"has accuracy {measured:.2%}, near chance ({chance:.2%})"
        stated = metadata.get("val_acc") or metadata.get("test_acc")
        tolerance = 0.05 + 3.0 * math.sqrt(0.25 / max(seen, 1))
        if stated and measured < float(stated) - tolerance:
            return f"has accuracy {measured:.2%}, far below the {float(stated):.2%} in its file"
        return None


class HealthMonitor(L.Callback):
    """Warn, once each, when attention picks a single learner or the learners' features lose their spread.

    Args:
        least_entropy: of the attention weights, as a share of the largest possible (log M).
        least_spread: of the learners' features, as a share of what the first validation saw.
    """

    def __init__(self, *, least_entropy: float = 0.05, least_spread: float = 0.35) -> None:
        self.least_entropy, self.least_spread = least_entropy, least_spread
        self.first_spread: float | None = None
        self.warned: set[str] = set()

    def _warn(self, key: str, sentence: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            rank_zero_warn(sentence)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare what this validation logged with the limits."""
        if trainer.sanity_checking or is_dry(trainer):
            return
        values = trainer.callback_metrics
        learners = len(cast("TrainingModule", pl_module).spec.branches)
        entropy, spread = values.get("val/attention_entropy"), values.get("val/learners_feature_std")
        if entropy is not None and learners > 1 and float(entropy) < self.least_entropy * math.log(learners):
            self._warn(
                "attention",
                f"attention has collapsed onto one learner (entropy {float(entropy):.3f} of {math.log(learners):.3f} "
                f"nats in epoch {trainer.current_epoch}); lower attention_lr_scale, or set attention to off",
            )
        if spread is None:
            return
        if self.first_spread is None:
            self.first_spread = float(spread)
        elif float(spread) < self.least_spread * self.first_spread:
            self._warn(
                "spread",
                f"the learners' features have lost their spread ({float(spread):.3f}, {self.first_spread:.3f} at the "
                f"start, epoch {trainer.current_epoch}); lower the learning rate, or the weight of what drives them",
            )

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs in order not to warn twice."""
        return {"first_spread": self.first_spread, "warned": sorted(self.warned)}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Restore what ``state_dict`` gave."""
        first, warned = state_dict["first_spread"], state_dict["warned"]
        self.first_spread = first if isinstance(first, float) else None
        self.warned = {str(each) for each in warned} if isinstance(warned, list) else set()


def checkpoint_bytes(module: L.LightningModule, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Size of a checkpoint: the weights, and what the optimizers remember of each.

    Args:
        module: whose state dict is written.
        optimizers: SGD with momentum remembers one number for each parameter, Adam two, SGD without momentum none.
    """
    size = sum(each.numel() * each.element_size() for each in module.state_dict().values() if torch.is_tensor(each))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            memories = 2 if "betas" in group else int(bool(group.get("momentum")))
            size += memories * sum(each.numel() * each.element_size() for each in group["params"])
    return size
