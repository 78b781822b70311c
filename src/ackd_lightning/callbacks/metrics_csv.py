"""``metrics.csv`` of a run."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

if TYPE_CHECKING:
    pass


class _KeepingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Go on with a file that is there; Lightning's own deletes it, also when a run is resumed."""
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class CurvesFile(CSVLogger):
    """``metrics.csv`` of a run; a resumed run adds to it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer."""
        if self._experiment is None:
            self._experiment = _KeepingWriter(self.log_dir)
        return cast(ExperimentWriter, self._experiment)
