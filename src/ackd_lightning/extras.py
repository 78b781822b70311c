"""Libraries that only some users need."""

from __future__ import annotations

import importlib
from typing import Any

from ackd_lightning.errors import ACKDError


def require(module: str, extra: str, needed_by: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: Name of the module, such as ``pyarrow.parquet``.
        extra: Extra of this package that installs it.
        needed_by: What needs it, for the message.

    Raises:
        ACKDError: If the library is not installed.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        raise ACKDError(
            f"{needed_by} needs the library {library}, which is not installed; "
            f"run: pip install 'ackd-lightning[{extra}]'"
        ) from error
