"""``metrics.csv`` of a run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from ackd_lightning.writing import whole_file


def drop_partial_line(path: Path) -> None:
    """Remove what a full disk or a loss of power left of the last line of a file.

    Args:
        path: Text file.
    """
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


class _AppendingWriter(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        """Keep a file that exists; Lightning's own writer deletes it, even when a run is resumed."""
        if self._fs.isfile(self.metrics_file_path):
            drop_partial_line(Path(self.metrics_file_path))
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Write the file again with more columns, whole or not at all; Lightning's own writer empties it first."""
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            rows = list(csv.DictReader(file))
        with whole_file(Path(self.metrics_file_path)) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)


class CurvesFile(CSVLogger):
    """Logger that writes ``metrics.csv``; a resumed run appends to it."""

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """Writer of the file."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.log_dir)
        return cast(ExperimentWriter, self._experiment)
