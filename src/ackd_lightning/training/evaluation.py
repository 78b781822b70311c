"""What is measured of a student on validation and test data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from ackd_lightning.functional import cross_entropy
from ackd_lightning.metrics.cka import LearnerStatistics
from ackd_lightning.types import NetOutput, NetSpec

if TYPE_CHECKING:
    from ackd_lightning.training.module import DistillationModule


class Evaluation(nn.Module):
    """Accuracy of the network that is kept, of each auxiliary learner and of their group; how alike the learners are.

    Args:
        spec: shapes of the student and its learners.
    """

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        count = len(spec.branches)
        self.learners = ["", *(f"aux{number}_" for number in range(count)), *(["ensemble_"] if count else [])]
        top = min(5, spec.num_classes)
        self.accuracies = nn.ModuleDict(
            {
                f"{learner}acc{suffix}": MulticlassAccuracy(spec.num_classes, top_k=top_k, average="micro")
                for learner in self.learners
                for suffix, top_k in (("", 1), ("_top5", top))
            }
        )
        widths = {branch.embedding for branch in spec.branches}
        alike = len(widths) == 1 and 0 not in widths  # features of different networks have no common space
        self.learner_statistics = LearnerStatistics(count, widths.pop()) if alike else None

    def update(self, module: DistillationModule, batch: Any, prefix: str) -> None:
        """Measure a batch and log.

        Args:
            module: in evaluation.
            batch: from any data module.
            prefix: ``val`` or ``test``.
        """
        batch = module.as_batch(batch)
        student: NetOutput = module.student(batch.image)
        prediction = module.method.prediction(student)
        logits = [prediction, *(branch.logits for branch in student.branches)]
        if student.branches:
            group = module.method.ensemble(student)
            logits.append(torch.stack(logits[1:]).mean(dim=0) if group is None else group)
        size = batch.image.shape[0]
        for learner, scores in zip(self.learners, logits, strict=True):
            for suffix in ("", "_top5"):
                metric = cast(MulticlassAccuracy, self.accuracies[f"{learner}acc{suffix}"])
                metric.update(scores, batch.target)
                shown = learner == "" and suffix == ""
                module.log(f"{prefix}/{learner}acc{suffix}", metric, on_epoch=True, prog_bar=shown, batch_size=size)
        loss = cross_entropy(prediction, batch.target)
        module.log(f"{prefix}/loss", loss, on_epoch=True, batch_size=size, sync_dist=True)
        if self.learner_statistics is not None:
            self.learner_statistics.update([each.embedding for each in student.branches], logits[1:-1])
        module.log_dict(module.method.statistics(student), on_epoch=True, batch_size=size, sync_dist=True)

    def end(self, module: DistillationModule) -> None:
        """Log CKA, disagreement and spread of the learners over the whole part.

        Args:
            module: in evaluation.
        """
        if self.learner_statistics is not None:
            values = self.learner_statistics.compute()
            module.log_dict({f"learners/{name}": value for name, value in values.items()}, sync_dist=True)
            self.learner_statistics.reset()
