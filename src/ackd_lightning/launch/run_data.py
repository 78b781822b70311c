"""The data of a run without its networks, for commands that use a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as L

from ackd_lightning.launch.execute import in_our_words
from ackd_lightning.launch.lightning import ACKDCLI


def data_of_run(
    checkpoint: Path, options: Sequence[str] = (), class_names: Sequence[str] | None = None
) -> L.LightningDataModule:
    """Build and set up the data module of a run.

    Args:
        checkpoint: Checkpoint of the run, whose folder has its settings.
        options: Further options of ``ackd test``, such as ``--data.root FOLDER``.
        class_names: Classes of the network in the order of its logits; the data get their order. None for their own.

    Raises:
        ACKDError: If the settings or the data are not there, or the data have other classes.
    """
    with in_our_words(options):
        data = ACKDCLI("test", [str(checkpoint), *options]).build_data()
        data.prepare_data()
        data.setup("test")
        reorder = getattr(data, "use_class_order", None)
        if class_names is not None and reorder is not None:
            reorder(class_names)
        return data
