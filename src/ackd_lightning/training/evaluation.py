"""What is measured of a student on validation and test data."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.loaders import data_of
from ackd_lightning.functional import cross_entropy
from ackd_lightning.methods.base import Method
from ackd_lightning.metrics.cka import WIDEST, LearnerStatistics
from ackd_lightning.models.student import BranchyStudent
from ackd_lightning.models.weight_files import tell
from ackd_lightning.training.batches import require_labels
from ackd_lightning.training.means import TermMeans
from ackd_lightning.training.nonfinite import remedies
from ackd_lightning.types import Batch, NetOutput, NetSpec

_DIVERGED = 1000.0
"""Multiple of the loss of a guess above which a validation loss is reported."""


class Evaluation(nn.Module):
    """Accuracy of the student, of each auxiliary learner and of their ensemble, and how similar the learners are.

    Args:
        spec: Shapes of the student and its auxiliary learners.
        method: Method, which may define a group of learners of its own.
    """

    def __init__(self, spec: NetSpec, method: Method) -> None:
        super().__init__()
        count = len(spec.branches)
        own_group = count > 0 and type(method).ensemble is not Method.ensemble
        self.learners = ["", *(f"aux{number}_" for number in range(1, count + 1))]
        self.learners += [*(["ensemble_"] if count else []), *(["group_"] if own_group else [])]
        top = min(5, spec.num_classes)
        self.accuracies = nn.ModuleDict(
            {
                f"{learner}acc{suffix}": MulticlassAccuracy(spec.num_classes, top_k=top_k, average="micro")
                for learner in self.learners
                for suffix, top_k in (("", 1), ("_top5", top))
            }
        )
        widths = {branch.embedding for branch in spec.branches}
        width = widths.pop() if len(widths) == 1 else None  # embeddings of different networks have no common space
        self.learner_statistics = LearnerStatistics(count, width) if width is not None else None
        if count > 1 and width is not None and width > WIDEST:
            tell(f"learners_cka is not measured, as the features of the learners have {width:,} entries")
        self.means = TermMeans()
        self._prefix = "val"
        self.others = nn.ModuleList()

    def of(self, loader: int, spec: NetSpec, method: Method) -> Evaluation:
        """Return what measures one of several loaders; keys of the second begin with ``val2/``.

        Args:
            loader: Number of the loader, from 0.
            spec: Shapes of the student.
            method: The method.
        """
        while len(self.others) < loader:
            own = cast(MulticlassAccuracy, next(iter(self.accuracies.values())))
            other = Evaluation(spec, method).to(own.device)
            other.begin(f"{self._prefix}{len(self.others) + 2}")
            self.others.append(other)
        return cast(Evaluation, self.others[loader - 1]) if loader else self

    def update(
        self, module: L.LightningModule, method: Method, student: NetOutput, prediction: Tensor, target: Tensor
    ) -> None:
        """Measure a batch and log.

        Args:
            module: Module that logs.
            method: The method.
            student: Output of the student.
            prediction: Logits ``B x K`` of the network that is kept.
            target: ``B`` int64.
        """
        prefix = self._prefix
        learners = [prediction, *(branch.logits for branch in student.branches)]
        logits = dict(zip(self.learners, learners, strict=False))
        if student.branches:
            logits["ensemble_"] = torch.stack([each.float() for each in learners]).mean(dim=0)
            if "group_" in self.learners and (group := method.ensemble(student)) is not None:
                logits["group_"] = group
        size = len(target)
        for learner, scores in logits.items():
            for suffix in ("", "_top5"):
                metric = cast(MulticlassAccuracy, self.accuracies[f"{learner}acc{suffix}"])
                metric.update(scores, target)
                shown = learner == "" and suffix == ""
                common: dict[str, Any] = {"on_epoch": True, "batch_size": size, "add_dataloader_idx": False}
                module.log(f"{prefix}/{learner}acc{suffix}", metric, prog_bar=shown, **common)
        loss = cross_entropy(prediction, target)
        if self.learner_statistics is not None:
            embeddings = [each.embedding for each in student.branches if each.embedding is not None]
            self.learner_statistics.update(embeddings, learners[1:])
        self.means.add({"loss": loss, **method.statistics(student)}, size)

    def begin(self, prefix: str) -> None:
        """Choose the split that logging keys name.

        Args:
            prefix: ``val`` or ``test``.
        """
        self._prefix = prefix
        self.means.reset()
        for number, other in enumerate(self.others, start=2):
            cast(Evaluation, other).begin(f"{prefix}{number}")

    def end(self, module: L.LightningModule) -> None:
        """Log loss and statistics of the method, and CKA, disagreement and feature std of the learners, of the split.

        Args:
            module: Module that logs.
        """
        # kept here, as Lightning rounds the number of images of a process down in a mean over several processes
        means = {f"{self._prefix}/{name}": value for name, value in self.means.compute().items()}
        module.log_dict(means, sync_dist=True)
        self.means.reset()
        if self.learner_statistics is not None and self.learner_statistics.update_called:
            values = self.learner_statistics.compute()
            module.log_dict({f"{self._prefix}/learners_{name}": each for name, each in values.items()}, sync_dist=True)
            self.learner_statistics.reset()
        for other in self.others:
            cast(Evaluation, other).end(module)


class EvaluationSteps(L.LightningModule):
    """Validation, test and prediction of a student.

    Attributes:
        student: The student with its auxiliary learners.
        method: The method.
        spec: Shapes of the student.
        evaluation: What is measured.
    """

    student: BranchyStudent
    method: Method
    spec: NetSpec
    evaluation: Evaluation

    @abstractmethod
    def as_batch(self, batch: Any, *, first: bool = False, targets: bool = True) -> Batch:
        """Read a batch of any data module."""

    @abstractmethod
    def prediction(self, student: NetOutput) -> Tensor:
        """Return logits ``B x K`` of the network that is kept."""

    def looks_at_test(self) -> bool:
        """Return whether the data have no validation part, so that validation reads the test set."""
        data = data_of(self.trainer)
        return isinstance(data, ImageDataModule) and data.val_is_test

    def on_validation_epoch_start(self) -> None:
        """Choose the split that logging keys name."""
        self._forget_loaders()
        self.evaluation.begin("test" if self.looks_at_test() else "val")

    def on_test_epoch_start(self) -> None:
        """Choose the split that logging keys name."""
        self._forget_loaders()
        self.evaluation.begin("test")

    def _forget_loaders(self) -> None:
        """Let Lightning forget what the steps of an earlier evaluation logged.

        It keeps whether that had several loaders and, as all loaders share their keys here, refuses another number.
        """
        results: dict[str, Any] = self.trainer._results or {}
        for key in [key for key, each in results.items() if each.meta.fx in ("validation_step", "test_step")]:
            del results[key]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Measure the student, each auxiliary learner and their ensemble on a batch.

        Returns:
            The result of `predict_step` for the batch.
        """
        batch = self.as_batch(batch, first=batch_idx == 0)
        require_labels(batch, check=batch_idx == 0)
        student: NetOutput = self.student(batch.image)
        if dataloader_idx > len(self.evaluation.others):
            self._metric_attributes = None  # Lightning's memory of the metrics that it has found in the module
        evaluation = self.evaluation.of(dataloader_idx, self.spec, self.method)
        logits = self.prediction(student)
        evaluation.update(self, self.method, student, logits, batch.target)
        return _predictions(logits, batch)

    def on_validation_epoch_end(self) -> None:
        """Log how similar the learners are."""
        self.evaluation.end(self)

    def on_validation_end(self) -> None:
        """Say what a loss far above that of a guess means, and what to do."""
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking or self._warned_of_loss:
            return
        loss = self.trainer.callback_metrics.get(f"{'test' if self.looks_at_test() else 'val'}/loss")
        chance = math.log(max(2, self.spec.num_classes))
        if loss is not None and not float(loss) < _DIVERGED * chance:
            self._warned_of_loss = True
            rank_zero_warn(
                f"the validation loss is {float(loss):,.0f} after epoch {self.current_epoch + 1} and that of a guess "
                f"is {chance:.1f}, so training may have diverged; {remedies(self)}"
            )

    _warned_of_loss = False

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Measure on a batch of test data.

        Returns:
            The result of `predict_step` for the batch.
        """
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log how similar the learners are."""
        self.evaluation.end(self)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return class, its probability, target and index of every image.

        Batches may hold images alone: then the targets are -1.

        Returns:
            Four tensors of length B.
        """
        batch = self.as_batch(batch, targets=False)
        return _predictions(self(batch.image), batch)


def _predictions(logits: Tensor, batch: Batch) -> dict[str, Tensor]:
    probability, prediction = logits.detach().float().softmax(dim=1).max(dim=1)
    return {"index": batch.index, "target": batch.target, "prediction": prediction, "probability": probability}
