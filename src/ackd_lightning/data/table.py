"""Images that a CSV or Parquet table lists."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ackd_lightning.data.custom import CustomImagesDataModule, say_shared, say_test_is_validation, split_test
from ackd_lightning.data.folders import part_of
from ackd_lightning.data.labels import Label, classes_of, read_labels, targets_of
from ackd_lightning.data.messages import say
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Files, Source, name_keys
from ackd_lightning.errors import ACKDError, count_of, first_line, first_names, near_matches
from ackd_lightning.extras import require
from ackd_lightning.validation import checked

_DELIMITERS = ",;\t|"


class TableDataModule(CustomImagesDataModule):
    """Images that a table lists, a line for each with its path and its label: CSV, TSV or Parquet.

    Labels are class names, or whole numbers; numbers that do not run from 0 are renumbered, with a line. An empty label
    or -1 in the training part is an image without a label, for methods whose labels are read by the cross-entropy
    alone. Without a test table and a column of parts, a stratified fifth, always the same, is the test set.

    Args:
        root: Folder that paths in the tables are relative to.
        train: Table of the training images, or of all images; relative to ``root``.
        val: Table of the validation images; None holds out a share of the training images.
        test: Table of the test images; None takes them from ``train``.
        path_column: Column with the paths.
        label_column: Column with the labels.
        split_column: Column of ``train`` that names the part of each image, such as ``train`` or ``test``; None for
            none.
        class_names: Names of the classes of labels that are numbers from 0, or the order of labels that are text; None
            for the numbers themselves, and for alphabetical order.
        options: Arguments of `CustomImagesDataModule`, and those of
            [`ImageDataModule`][ackd_lightning.data.ImageDataModule].

    Raises:
        ACKDError: If a table, a column or a file is missing, or a label is not a class.
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        *,
        train: str,
        val: str | None = None,
        test: str | None = None,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str | None = None,
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        if split_column is not None and (val or test):
            raise ACKDError("split_column names the parts of one table, so leave val and test out")
        self._label = Path(train).stem
        self._table = self.root / train
        self._rows_of: dict[str, list[_Row]] = {}
        columns = (path_column, label_column)
        for part, name in (("train", train), ("val", val), ("test", test)):
            if name is not None:
                self._rows_of[part] = _rows(self.root, name, columns, split_column, class_names)
        if split_column is not None:
            every = self._rows_of["train"]
            self._rows_of = {part: [row for row in every if row.part == part] for part in ("train", "val", "test")}
            self._rows_of = {part: rows for part, rows in self._rows_of.items() if rows}
        if "test" not in self._rows_of and "val" in self._rows_of:
            self._rows_of["test"] = self._rows_of.pop("val")
            say_test_is_validation(self._table, holds_out=not self.val_is_test)
        train_rows = self._rows_of.get("train", [])
        index, names = classes_of([row.label for row in train_rows], class_names, str(self._table))
        self._targets = {part: self._targets_of(part, index) for part in self._rows_of}
        self._has_validation = "val" in self._rows_of
        self._labels = [(str(names[position]), label) for label, position in index.items()]
        self._say_shared()
        self._names = tuple(names)
        self.class_names = self._names
        self.num_classes = len(names)

    def _targets_of(self, part: str, index: dict[Label, int]) -> Tensor:
        rows = self._rows_of[part]
        return targets_of([row.label for row in rows], index, lambda at: rows[at].place, train=part == "train")

    def _say_shared(self) -> None:
        """Say which images are listed more than once, and which classes have none in a part."""
        for rows in self._rows_of.values():
            self._say_twice(rows)
        for part in ("val", "test"):
            here = {row.label for row in self._rows_of.get(part, [])}
            missing = [name for name, label in self._labels if here and label not in here]
            if missing:
                count = f"{len(missing):,} of the training part's classes"
                say(f"the {part} part has no images of {count}: {first_names(missing)}")
        paths = {part: {row.path for row in rows} for part, rows in self._rows_of.items()}
        for part in ("val", "test"):
            say_shared(part, sorted(paths.get(part, set()) & paths.get("train", set())))

    @staticmethod
    def _say_twice(rows: Sequence[_Row]) -> None:
        first: dict[str, _Row] = {}
        repeated, contradicting = list[_Row](), list[_Row]()
        for row in rows:
            other = first.setdefault(row.path, row)
            if other is not row:
                (repeated if other.label == row.label else contradicting).append(row)
        if repeated:
            one = repeated[0]
            say(f"{count_of(len(repeated), 'image')} listed again, such as {one.path} in {one.place}")
        if contradicting:
            one, other = contradicting[0], first[contradicting[0].path]
            say(
                f"{count_of(len(contradicting), 'image')} listed with two labels, such as {one.path}: {other.label!r} "
                f"in {other.place} and {one.label!r} in {one.place}"
            )

    def _load(self, part: Part) -> Source:
        name = part if part in self._rows_of else "train"
        rows = self._rows_of[name]
        # os.path.isfile also takes a name that is too long for a file
        missing = [row for row in rows if not os.path.isfile(self.root / row.path)]  # noqa: PTH113
        if missing:
            turned = os.sep == "/" and all("\\" in row.path for row in missing)
            remedy = "write them with / in place of \\" if turned else "correct the paths, which are relative to root"
            raise ACKDError(
                f"{len(missing):,} of {len(rows):,} images of {self.root} are missing, the first is "
                f"{self.root / missing[0].path} of {missing[0].place}: {remedy}"
            )
        files = Files(self.root, self._names, PathTable(self.root, [row.path for row in rows]), self._targets[name])
        if "test" not in self._rows_of:
            files = files.select(split_test(files.targets, part, self._table, names=self._names, keys=name_keys(files)))
        return self._read(files, self.root, f"{self._label}-{part}")


class _Row:
    """A line of a table."""

    __slots__ = ("label", "part", "path", "place")

    def __init__(self, path: str, label: Label, part: str, place: str) -> None:
        self.path, self.label, self.part, self.place = path, label, part, place


def _rows(
    root: Path, name: str, columns: tuple[str, str], split_column: str | None, names: Sequence[str] | None
) -> list[_Row]:
    """Read the lines of a table; ``names`` are the class names that the user gives."""
    table = root / name
    if not table.is_file():
        raise ACKDError(f"there is no table {table}: set train, val and test to CSV or Parquet files, relative to root")
    arguments = zip(("path_column", "label_column", "split_column"), (*columns, split_column), strict=True)
    named = {argument: column for argument, column in arguments if column is not None}

    def choose(there: Sequence[str]) -> Sequence[str]:
        for argument, column in named.items():
            if column not in there:
                hint = near_matches(column, filter(None, there))
                raise ACKDError(f"{table} has no column {column!r}: {hint}; set {argument}")
        return [*named.values()]

    content = read_columns(table, choose)
    lines = content.get("")

    def place(row: int) -> str:
        return f"row {row + 1} of {table}" if lines is None else f"line {lines[row]} of {table}"

    paths = content[columns[0]]
    if not len(paths):
        raise ACKDError(f"{table} lists no images: add a line for each")
    other = next((row for row, path in enumerate(paths) if not isinstance(path, str | None)), None)
    if other is not None:
        raise ACKDError(
            f"column {columns[0]!r} holds {type(paths[other]).__name__} in {place(other)}, and paths are text: set "
            "path_column"
        )
    empty = next((row for row, path in enumerate(paths) if not (path or "").strip()), None)
    if empty is not None:
        raise ACKDError(f"{place(empty)} has no path in column {columns[0]!r}: add it")
    labels = read_labels(content[columns[1]], place, names)
    parts = ["train"] * len(paths) if split_column is None else _parts(content[split_column], place)
    folder = os.path.join(os.path.abspath(root), "")  # noqa: PTH100, PTH118
    return [_Row(_below(str(path), folder), labels[row], parts[row], place(row)) for row, path in enumerate(paths)]


def _below(path: str, folder: str) -> str:
    """Write a path in one way: without ``./``, and relative to a folder where it is in it."""
    if ".." not in path:  # which is not the folder above where a link is before it
        path = os.path.normpath(path)
    return path.removeprefix(folder)


def _parts(values: Sequence[Any], place: Any) -> list[str]:
    parts = []
    for row, value in enumerate(values):
        part = part_of(str(value).strip())
        if part is None:
            raise ACKDError(f"{place(row)} names the part {value!r}: it must be train, val or test")
        parts.append(part)
    return parts


Choice = Callable[[Sequence[str]], Sequence[str]]
"""Function of the names of all columns that returns those to read."""


def read_columns(table: Path, choose: Choice) -> Mapping[str, Sequence[Any]]:
    """Read some columns of a table, a Parquet file by its ending and otherwise CSV with any usual delimiter.

    Args:
        table: File that exists.
        choose: Function of the names of all columns that returns those to read.

    Returns:
        Values of each chosen column by its name; of a CSV file also the number of each line, by an empty name.

    Raises:
        ACKDError: If it cannot be read.
    """
    return _parquet(table, choose) if table.suffix.lower() in (".parquet", ".pq") else _csv(table, choose)


def _csv(table: Path, choose: Choice) -> Mapping[str, Sequence[Any]]:
    """Read a CSV file; the entry ``""`` holds the number of each line."""
    reader = csv.reader([])
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            delimiter = max(_DELIMITERS, key=header.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            names = [name.strip() for name in next(reader, [])]
            _check_names(names, table)
            columns: dict[str, list[Any]] = {name: [] for name in choose(names)}
            columns[""] = []
            for values in reader:
                if not values:
                    continue
                if len(values) != len(names):
                    raise ACKDError(
                        f"line {reader.line_num} of {table} has {len(values)} fields and the header {len(names)}: "
                        "correct it, or quote text that holds the delimiter"
                    )
                for name, value in zip(names, values, strict=True):
                    if name and name in columns:  # pandas writes its index without one
                        columns[name].append(value)
                columns[""].append(reader.line_num)
    except UnicodeDecodeError as error:
        raise ACKDError(f"{table} is not in UTF-8 ({error}): save it so") from None
    except csv.Error as error:
        raise ACKDError(
            f"line {reader.line_num} of {table} cannot be read as CSV ({error}): correct its quotes and delimiters"
        ) from None
    return columns


def _check_names(names: Sequence[str], table: Path) -> None:
    """Refuse tables without a column, and those with two columns of one name."""
    if not names:
        raise ACKDError(f"{table} is empty: write a header and a line for each image")
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ACKDError(f"{table} has {names.count(twice)} columns {twice!r}: rename all but one")


def _parquet(table: Path, choose: Choice) -> Mapping[str, Sequence[Any]]:
    parquet, pyarrow = require("pyarrow.parquet", "parquet", str(table)), require("pyarrow", "parquet", str(table))
    try:
        names = parquet.read_schema(table).names
        _check_names(names, table)
        chosen = [*choose(names)]
        content: Mapping[str, Sequence[Any]] = parquet.read_table(table, columns=chosen).to_pydict()
    except (ACKDError, PermissionError):
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise ACKDError(f"{table} cannot be read as Parquet ({first_line(error, 300)}): write it again") from None
    return content
