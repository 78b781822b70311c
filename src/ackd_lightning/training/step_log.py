"""What a training step logs: means over the epoch, and the loss of single steps where somebody reads it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ackd_lightning.methods.base import Method
from ackd_lightning.training.labels import Labels, accuracy
from ackd_lightning.training.means import TermMeans
from ackd_lightning.training.nonfinite import SkippingModule
from ackd_lightning.types import Batch, NetOutput


class LoggedSteps(SkippingModule):
    """Training steps whose terms are logged as means of their epoch.

    Attributes:
        method: The method.
        means: Means of what a step logs.
        labelling: Label smoothing and class weights.
    """

    method: Method
    means: TermMeans
    labelling: Labels
    _shares: Tensor | None = None
    """Shares of the classes in the mixed images of the batch."""

    def log_terms(self, loss: Tensor, terms: Mapping[str, Tensor], student: NetOutput, batch: Batch) -> None:
        """Log means over the epoch of the loss and every unweighted term, and the loss of steps that loggers write.

        Args:
            loss: Weighted sum.
            terms: Unweighted terms.
            student: Output of the student.
            batch: Batch of the step.
        """
        size = batch.image.shape[0]
        values = {"train/loss": loss, **{f"train/{name}": value for name, value in terms.items()}}
        if self.method.head is None and not self.labelling.unlabelled:  # else these logits are not trained
            values["train/acc"] = accuracy(student.logits, batch.target, self._shares)
        self.means.add(values, size)
        trainer = self.trainer
        shown = trainer.progress_bar_callback is not None  # a bar waits for the number in every step
        if shown or trainer.fast_dev_run or trainer._logger_connector.should_update_logs:  # type: ignore[attr-defined]
            self.log("train/loss_step", loss.detach(), prog_bar=shown, batch_size=size)
        if trainer.is_last_batch:
            self._log_means()

    def _log_means(self) -> None:
        """Log the means of an epoch; every process has to call it."""
        means = dict(self.means.compute())
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        self.means.reset()

    def on_train_start(self) -> None:
        """Discard what an earlier fit has left."""
        super().on_train_start()
        self.means.reset()

    def on_train_epoch_end(self) -> None:
        """Log the means of an epoch that was cut short."""
        super().on_train_epoch_end()
        self._log_means()
