"""The start of a fit: what a training module checks, loads and tells its method before the first step."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_only

from ackd_lightning.callbacks.length import epochs_before_fit
from ackd_lightning.data.loaders import ImageLoaders, data_of
from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.training.labels import check_labels, check_sampling
from ackd_lightning.training.monitored import check_monitors
from ackd_lightning.training.own_callbacks import own_callbacks
from ackd_lightning.training.own_optimizers import take_assigned
from ackd_lightning.training.speed import GRAPHS, refuse_graphs, speed_up
from ackd_lightning.training.steps import TrainingSteps
from ackd_lightning.training.strategies import refuse_sharding
from ackd_lightning.training.teacher_cache import open_cache
from ackd_lightning.training.teacher_choice import check_features_only
from ackd_lightning.types import NetSpec

_SHORT = 3
"""Multiple of the warm-up below which a fit is short."""
PASS_TEACHER = "pass it, as in load_from_checkpoint(path, teacher=network)"


class FitStart(TrainingSteps):
    """Checks and preparations when Lightning starts a fit.

    Attributes:
        absent: Shapes of the teachers that a checkpoint describes and does not hold.
    """

    absent: tuple[NetSpec, ...]

    def setup(self, stage: str) -> None:
        """Load the teachers and tell the method about the fit."""
        refuse_sharding(self.trainer.strategy)
        take_assigned(self)
        data = data_of(self.trainer)
        if stage != "fit":
            self._take_class_names(data)
            return
        if self.compiles == GRAPHS:
            refuse_graphs(self.trainer)
        if not (self.training and self.student.training and self.student.backbone.training):
            self.train()  # Lightning trains in the mode that it finds
        if self.absent:
            raise ACKDError(f"the teacher of the checkpoint was a network, which it does not hold; {PASS_TEACHER}")
        self.check_data(data)
        check_monitors(self)
        self.load_teacher()
        for each in self.teachers:
            each.fingerprint()  # before the Trainer converts it to another type
        matched = self.start is not None and self.start.class_names is not None
        self.match_classes(data)
        before = self._method_sizes()
        if isinstance(data, ImageLoaders):
            data.whole_batches = self.method.whole_batches
        self._epochs = epochs_before_fit(self.trainer)
        self._begin_fit()
        check_features_only(self, data)
        check_sampling(self.method, data)
        speed_up(
            self.student,
            self.method,
            self.teachers.frozen,
            input_size=self.data.input_size,
            channels_last=self.channels_last,
            compiles=self.compiles,
        )
        self._say_warmup()
        self.cache = open_cache(
            self,
            data,
            epochs=self.trainer.max_epochs,
            precision=str(self.trainer.precision),
            overfits=bool(getattr(self.trainer, "overfit_batches", 0)),
        )
        if self.method.teacher == "own" or self._method_sizes() != before or matched:
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback.setup(self.trainer, self, stage)  # it has copied the module as it was before

    def _say_warmup(self) -> None:
        """Say that a fit, often one that was shortened, is in large part warm-up of the learning rate."""
        warmup, epochs = self.recipe.warmup_epochs, self._epochs or 0
        if getattr(self.trainer, "fast_dev_run", False) or not 0 < epochs < _SHORT * warmup:
            return
        found = f"the warm-up of the learning rate takes {warmup} of {count_of(epochs, 'epoch')}"
        if warmup >= epochs:
            found = (
                f"the warm-up of the learning rate takes {count_of(warmup, 'epoch')} and the fit {epochs}, so that it"
            )
            found += " never reaches its full value"
        rank_zero_only(print)(f"{found}; model.recipe.warmup_epochs sets another length", flush=True)

    def on_train_start(self) -> None:
        """Say that a checkpoint of a validation would not hold the gradients of a step that is not whole yet."""
        super().on_train_start()
        every, batches = self.trainer.val_check_batch, self.trainer.accumulate_grad_batches
        if batches > 1 and isinstance(every, int) and every % batches and every < self.trainer.num_training_batches:
            rank_zero_only(print)(
                f"validation after every {every} batches is inside a step of {batches}: a run that is resumed from "
                "best.ckpt lacks the gradients of a part of a step, one that is resumed from last.ckpt does not",
                flush=True,
            )

    def check_data(self, data: Any) -> None:
        """Refuse a data module that does not go with method and recipe.

        Args:
            data: Data module, which need not be set up; None for loaders alone.

        Raises:
            ACKDError: Naming the setting.
        """
        check_labels(self.method, self.recipe, data)
        if self.recipe.early_stopping is None or self._trainer is None:
            return
        if not self.trainer.enable_validation or self.looks_at_test():
            problem = "validation reads the test set" if self.looks_at_test() else "there is no validation"
            raise ACKDError(
                f"recipe.early_stopping is {self.recipe.early_stopping} and {problem}; set it to null, or hold "
                "validation data out (data.val_fraction)"
            )

    def _method_sizes(self) -> dict[str, torch.Size]:
        method = self.method
        return {name: each.shape for name, each in (*method.named_parameters(), *method.named_buffers())}

    def configure_callbacks(self) -> list[L.Callback]:
        """Return what comes with the module into any Trainer: alarms, the teacher gate, and callbacks of the recipe."""
        branches = bool(self.spec.branches)
        return own_callbacks(self.trainer, self.method, self.recipe, self.teachers.configs, branches=branches)
