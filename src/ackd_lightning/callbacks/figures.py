"""Figures in the folder of a run, drawn when its fit ends."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from ackd_lightning.callbacks.health import is_fast_dev_run
from ackd_lightning.errors import RunStoppedError


def draw_figures(folder: Path) -> None:
    """Draw the figures of a run; a failure is a warning, as no run may end because of a picture.

    Args:
        folder: Folder of the run.
    """
    try:
        from ackd_lightning.runs.figures import draw_run

        draw_run(folder)
    except ModuleNotFoundError as error:
        rank_zero_warn(f"no figures are drawn, because {error.name} is not installed; run: pip install {error.name}")
    except Exception as error:  # a full disk, a damaged metrics.csv, a fault of matplotlib
        rank_zero_warn(
            f"no figures are drawn ({type(error).__name__}: {str(error)[:200]}); metrics.csv has the numbers"
        )


class RunFigures(L.Callback):
    """Draw ``curves.png``, and ``learners.png`` for a method with several learners, when a fit ends or is stopped.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the whole run."""
        self._draw(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Draw a run that a signal has stopped, as far as it is."""
        if isinstance(exception, RunStoppedError):
            self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        there = (self.folder / "metrics.csv").is_file()  # not with a logger of the user's
        if trainer.is_global_zero and there and not is_fast_dev_run(trainer):
            draw_figures(self.folder)
