"""Log to Weights & Biases in a way that cannot end a run."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ackd_lightning.data.messages import on_first_process
from ackd_lightning.runs.files import copied_from
from ackd_lightning.writing import write_whole


class SafeWandbLogger(WandbLogger):
    """Log to Weights & Biases until that fails; then warn once and log nothing more, while training continues.

    The constructor is that of ``WandbLogger``.
    """

    failed = False

    def _try(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            action(*arguments)
        except Exception as error:  # network, disk, service, a bug in the client: no reason to end a run
            self.failed = True
            reason = (str(error).splitlines() or [""])[0][:200]
            rank_zero_warn(
                f"Weights & Biases failed ({type(error).__name__}: {reason}); the run continues without it, and "
                "metrics.csv has every number"
            )

    @property
    def experiment(self) -> Any:
        """Run of Weights & Biases; after a failure, an object that accepts every call and does nothing."""
        found: list[Any] = []
        self._try(lambda: found.append(super(SafeWandbLogger, self).experiment))
        return found[0] if found else DummyLogger().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers.

        Args:
            metrics: Values by name.
            step: Training step.
        """
        self._try(super().log_metrics, metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log settings.

        Args:
            params: Values by name.
        """
        self._try(super().log_hyperparams, params)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            key: Name of the images.
            images: Arrays or paths.
            step: Training step.
            kwargs: Further arguments of ``WandbLogger.log_image``.
        """
        self._try(lambda: super(SafeWandbLogger, self).log_image(key, images, step, **kwargs))

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Upload a checkpoint if the logger was asked to.

        Args:
            checkpoint_callback: Callback that has saved it.
        """
        self._try(super().after_save_checkpoint, checkpoint_callback)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the run.

        Args:
            status: How the fit ended.
        """
        self._try(super().finalize, status)


def run_id(folder: Path) -> str:
    """Return the id of a run at Weights & Biases, which stays the same when the run is resumed.

    The agent of a sweep chooses the id of each trial, and the client ignores every other one. A copy of a run gets one
    of its own.

    Args:
        folder: Folder of the run, which keeps the id.
    """
    path = folder / "wandb_id.txt"
    agents = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    known = path.is_file() and copied_from(folder) is None
    if on_first_process() and not known:
        write_whole(agents or secrets.token_hex(4), path)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else agents or secrets.token_hex(4)


def offline() -> bool:
    """Return whether Weights & Biases logs to the disk: it was told to, or has no key and must not ask for one."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "dryrun", "disabled"):
        return mode != "disabled"
    if os.environ.get("WANDB_API_KEY"):
        return False
    import wandb

    return not wandb.Settings().api_key and not _netrc_key()


def _netrc_key() -> bool:
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
