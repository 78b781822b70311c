"""Carry out a run, or plan one: Lightning's command line with its warnings and errors in our words."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ackd_lightning.launch.arguments import deepest
from ackd_lightning.launch.lightning import ACKDCLI

_CHATTY = (
    "lightning.pytorch.utilities.rank_zero",  # tips, device lists
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",  # how it reads an argument of its own
)
_NOT_OURS = (
    ".*LeafSpec.*",  # torch 2.15 deprecates what Lightning 2.6.6 calls
    ".*smaller than the logging interval.*",  # epoch means are logged whatever the interval
    ".*does not have many workers.*",  # data in memory needs none
    ".*callbacks used to create the checkpoint need to be provided.*",  # not for testing
    ".*exists and is not empty.*",  # a run's folder was checked before
    ".*module\\(s\\) in eval mode at the start.*",  # what a method has frozen
)


class PlannedRun(ACKDCLI):
    """A fit whose settings are read and whose networks are built, but which is not carried out.

    Args:
        arguments: behind ``ackd fit``.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__("fit", arguments)

    def _set_seed(self) -> None:
        """A plan draws nothing."""

    def before_instantiate_classes(self) -> None:
        """Name the folder without looking whether it is taken."""
        self.folder = Path(self.option("runs_dir")) / (self.config_name or "run") / str(self.option("name"))

    def instantiate_classes(self) -> None:
        """Build data module and module, no Trainer."""
        config = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = self._get(config, "data"), self._get(config, "model")

    def forget_networks(self) -> None:
        """Free the memory of the networks; data module and settings stay."""
        del self.model

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


@contextlib.contextmanager
def in_our_words() -> Iterator[None]:
    """Warnings as sentences, chatter off, and our own error out of a chain of others."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))  # class paths of one's own files
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    formatter = warnings.formatwarning
    with warnings.catch_warnings():
        for message in _NOT_OURS:
            warnings.filterwarnings("ignore", message)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(jsonargparse|lightning)\..*")
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # a sentence, not a place in our code
        try:
            yield
        except ValueError as error:
            ours = deepest(error)
            if ours is None or ours is error:
                raise
            raise type(ours)(str(ours)) from error
        finally:
            warnings.formatwarning = formatter


def plan(arguments: Sequence[str]) -> PlannedRun:
    """Read and build a fit without carrying it out.

    Args:
        arguments: behind ``ackd fit``.

    Raises:
        ACKDError: for whatever is wrong with them.
    """
    with in_our_words():
        return PlannedRun(arguments)


def run(command: str, arguments: Sequence[str]) -> None:
    """Carry out one of Lightning's subcommands.

    Args:
        command: fit, validate, test or predict.
        arguments: behind it.
    """
    with in_our_words():
        ACKDCLI(command, arguments)
