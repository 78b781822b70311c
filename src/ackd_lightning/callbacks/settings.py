"""``config.yaml`` of a run: its resolved settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from ackd_lightning.config.yaml_files import plain_settings
from ackd_lightning.data.loaders import data_of
from ackd_lightning.runs.files import RUN, STARTED, started_in
from ackd_lightning.writing import write_whole


class RunConfig(SaveConfigCallback):
    """Write the resolved settings of a run to ``config.yaml`` in its folder and to every logger.

    Args:
        parser: Parser of the command line.
        config: Settings that it returned.
        folder: Folder of the run.
    """

    def __init__(self, parser: Any, config: Any, *, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder, self.waits = folder, False

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the settings when a fit starts; called once, in the first process."""
        if stage == "fit":
            self.waits = (self.folder / "config.yaml").is_file()  # a resume may still be refused
            text = self._text() if self.waits else self._write()
            for logger in trainer.loggers:
                if not isinstance(logger, CSVLogger):
                    logger.log_hyperparams({"cli": yaml.safe_load(text)})

    def _text(self) -> str:
        config = self.config.clone()
        if config.get("resume"):  # a new run with these settings starts from the beginning
            config.resume = config.ckpt_path = None
        return str(yaml.safe_dump(plain_settings(self.parser, config), sort_keys=False))

    def _write(self) -> str:
        text, path = self._text(), self.folder / "config.yaml"
        start = started_in(path) or Path.cwd()  # of a run that is resumed: where it was started first
        write_whole(f"{STARTED}{start}\n{RUN}{self.folder.resolve()}\n{text}", path)
        return text

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the settings of a resumed run, whose state is restored now, and what Lightning's finders changed."""
        found = {
            "model.optimizer.init_args.lr": getattr(pl_module, "lr", None),
            "data.init_args.batch_size": getattr(data_of(trainer), "batch_size", None),
        }
        changed = {
            name: value
            for name, value in found.items()
            if value is not None and self.config.get(name) is not None and self.config[name] != value
        }
        if not trainer.is_global_zero:
            return
        for name, value in changed.items():
            print(f"{name.replace('.init_args', '')} is {value:g} instead of {self.config[name]:g}", flush=True)
            self.config[name] = value
        if changed or self.waits:
            self._write()
