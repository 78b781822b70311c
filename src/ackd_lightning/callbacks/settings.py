"""``config.yaml`` of a run: its resolved settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

if TYPE_CHECKING:
    pass


class RunConfig(SaveConfigCallback):
    """The resolved settings of a run: ``config.yaml`` in its folder, and into every logger."""

    def __init__(self, parser: Any, config: Any, *, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write once, on the first process, when a fit starts."""
        text = self.parser.dump(self.config, skip_none=False)
        if stage == "fit":
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(text, encoding="utf-8")
            for logger in trainer.loggers:
                if not isinstance(logger, CSVLogger):
                    logger.log_hyperparams({"cli": yaml.safe_load(text)})
