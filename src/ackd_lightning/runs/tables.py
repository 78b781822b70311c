"""Tables of predictions, as CSV or as Parquet."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from ackd_lightning.errors import ACKDError
from ackd_lightning.extras import require
from ackd_lightning.writing import whole_file

PARQUET = frozenset({".parquet", ".pq"})


def check_ending(path: Path) -> None:
    """Refuse a file whose ending names no table, or one that cannot be written here.

    Args:
        path: Value of ``--output``.

    Raises:
        ACKDError: For another ending, or if Parquet needs a library that is not installed.
    """
    if path.suffix.lower() not in (".csv", *PARQUET):
        raise ACKDError(f"--output is {path}; name a file that ends in .csv or .parquet")
    if path.suffix.lower() in PARQUET:
        require("pyarrow.parquet", "parquet", f"--output {path}")


def write_table(columns: dict[str, list[Any]], path: Path) -> None:
    """Write a table as CSV, or as Parquet by its ending, whole or not at all.

    Args:
        columns: Values of each column.
        path: File to write.

    Raises:
        ACKDError: If it cannot be written, or Parquet needs a library that is not installed.
    """
    try:
        with whole_file(path) as partial:
            if path.suffix.lower() in PARQUET:
                parquet = require("pyarrow.parquet", "parquet", f"--output {path}")
                texts = {name: list(map(_utf8, values)) for name, values in columns.items()}
                parquet.write_table(require("pyarrow", "parquet", f"--output {path}").table(texts), partial)
                return
            with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
                writer = csv.writer(out)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
    except OSError as error:
        raise ACKDError(f"--output {path} cannot be written ({error.strerror}); choose another place") from error


def _utf8(value: Any) -> Any:
    """Text as Parquet takes it: bytes of a file's name that are not UTF-8 stand as the replacement character."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if isinstance(value, str) else value
