"""``ackd init FOLDER``: look at the photos, choose, write, and say what to type next."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from rich.table import Table

from ackd_lightning.commands.init.choices import Choice, Choices, choose, reasons
from ackd_lightning.commands.init.duration import durations
from ackd_lightning.commands.init.sheet import COLUMNS, write_sheet
from ackd_lightning.commands.init.survey import Survey, survey
from ackd_lightning.commands.init.writing import student_text, teacher_text
from ackd_lightning.commands.stopwatch import rough
from ackd_lightning.errors import ACKDError, count_of, first_line, near_matches
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.runs.console import show_table
from ackd_lightning.writing import write_whole

_SHOWN = 5


def init(
    folder: str,
    *,
    out: str = ".",
    pretrained: bool = True,
    overwrite: bool = False,
    train_dir: str | None = None,
    val_dir: str | None = None,
    test_dir: str | None = None,
) -> None:
    """Describe a folder of photos and write a teacher's and a student's configuration.

    Args:
        folder: Folder of class folders, or with folders for training, validation and test.
        out: Folder of the new files.
        pretrained: Whether the teacher may start from published weights.
        overwrite: Whether to replace files.
        train_dir: Folder in ``folder`` with the training images; None for the one that is named so.
        val_dir: The same for validation.
        test_dir: The same for the test.

    Raises:
        ACKDError: If there are no such photos, or files exist.
    """
    named = Path(folder) if Path(folder).name not in ("", "..") else Path(folder).resolve()  # a link keeps its own name
    name = re.sub(r"\W+", "_", named.name).strip("_") or "photos"
    place = Path(out)
    files = [place / f"{name}{ending}" for ending in ("_teacher.yaml", "_student.yaml", "_samples.png", "_broken.txt")]
    if not named.is_dir():
        beside = [str(each) for each in named.parent.glob("*/")] if named.parent.is_dir() else []
        near = near_matches(str(named), beside, otherwise="name one of class folders")
        raise ACKDError(f"there is no folder {folder}; {near}")
    _refuse_other_bytes(folder, train_dir, val_dir, test_dir)
    if (there := [each for each in files if each.exists()]) and not overwrite:
        raise ACKDError(f"{there[0]} exists; choose another --out, or pass --overwrite")
    check_writable(place, "--out")
    places = {"train_dir": train_dir, "val_dir": val_dir, "test_dir": test_dir}
    try:
        seen = survey(folder, **places)
    except ACKDError as error:
        raise ACKDError(_as_command(str(error))) from error
    _describe(folder, seen)
    rows = write_sheet(seen, files[2])
    more = f" of the first {rows} classes" if rows < len(seen.class_names) else ""
    print(f"samples: {files[2]}, {COLUMNS} training images{more or ' of each class'}")
    chosen = choose(seen, pretrained=pretrained)
    _show(reasons(seen, chosen, asked=pretrained))
    teacher, student, _, listed = files
    weights = f"weights/{teacher.stem}.safetensors"
    _write(teacher, teacher_text(folder, chosen, places))
    _write(student, student_text(folder, chosen, places, weights=weights))
    for each in (teacher, student):
        ACKDCLI("fit", ["--config", str(each)])  # what is written can be read
    _next(seen, (teacher, student), listed, chosen)


def _refuse_other_bytes(*folders: str | None) -> None:
    """Refuse folders that a configuration cannot name."""
    for folder in filter(None, folders):
        try:
            folder.encode("utf-8")
        except UnicodeEncodeError:
            raise ACKDError(
                f"the folder {os.fsencode(folder)!r} has a name that is not UTF-8, and a configuration cannot name it; "
                "rename it"
            ) from None


def _as_command(message: str) -> str:
    """A message of the data with the command in place of the setting, which is at its end."""
    before, found, root = message.partition("set root to ")
    return f"{before}run ackd init {shlex.quote(root)}" if found else message


def _write(path: Path, text: str) -> None:
    write_whole(text, path, errors="surrogateescape")  # names of files may be no UTF-8


def _describe(folder: str, seen: Survey) -> None:
    parts = ", ".join(f"{part} {len(files):,}" for part, files in seen.parts.items())
    print(f"{folder}: {len(seen.class_names):,} classes, {count_of(len(seen.photos), 'image file')} ({parts})")
    counts = sorted(zip(seen.counts, seen.class_names, strict=True))
    middle = counts[len(counts) // 2][0]
    print(
        f"training images of a class: {counts[0][0]:,} ({counts[0][1]}) to {counts[-1][0]:,} ({counts[-1][1]}), "
        f"median {middle:,}"
    )
    if deeper := seen.deeper:
        print(
            f"the images lie in folders inside the class folders, such as {deeper[0]} and {deeper[1]}; if those are "
            "the classes, move them into one folder and name it"
        )
    smallest, median, largest = seen.sides
    formats = ", ".join(f"{kind} {count:,}" for kind, count in seen.formats.most_common())
    sides = f"{smallest} to {largest} pixels, median {median}" if smallest < largest else f"all {largest} pixels"
    print(f"shorter sides: {sides}; formats: {formats}")
    if broken := seen.broken:
        more = f", the first {_SHOWN} of them" if len(broken) > _SHOWN else ""
        print(f"broken: {count_of(len(broken), 'file')}{more}")
        for path in broken[:_SHOWN]:
            print(f"  {seen.photos[path].problem}")
    if not seen.compared:
        print("duplicates: not looked for, as the files are too large to be read here")
    for pairs, what in (
        (seen.shared, "in two parts of the data"),
        (seen.contradicting, "in two classes"),
        (seen.repeated, "in one class, which may be trained on and validated on"),
    ):
        if pairs:
            print(
                f"equal files {what}: {len(pairs):,}, such as {pairs[0][0]} and {pairs[0][1]}; delete one of each pair"
            )


def _show(rows: list[Choice]) -> None:
    table = Table(title="chosen values")
    for column in Choice._fields:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    show_table(table)


def _next(seen: Survey, configs: tuple[Path, Path], listed: Path, chosen: Choices) -> None:
    print(f"written: {configs[0]}, {configs[1]}")
    listed.unlink(missing_ok=True)  # of an earlier call
    if seen.broken:
        _write(listed, "".join(f"{path}\n" for path in seen.broken))
        print(f"first replace or delete the broken files: no fit starts while they are there; {listed} lists them")
    if chosen.pretrained:
        print(f"the teacher's fit downloads the weights of {chosen.teacher} once; --no-pretrained does without")
    commands = [f"ackd fit --config {shlex.quote(str(each))}" for each in configs]
    about, title = _about(seen, chosen), "next, with durations on this machine at its present load:"
    print(title if any(about) else "next:")
    longest = max(map(len, commands))
    for command, duration in zip(commands, about, strict=True):
        print(f"  {command:<{longest}}  {duration}".rstrip())


def _about(seen: Survey, chosen: Choices) -> tuple[str, str]:
    """Words for the durations of both fits; empty where they cannot be measured."""
    if seen.broken:  # no fit starts with them
        return "", ""
    try:
        teacher, student = durations(seen, chosen)
    except (ACKDError, OSError, RuntimeError, ValueError) as error:  # such as no memory left on a shared GPU
        print(f"how long the fits take is not known: {first_line(error, 1000)}")
        return "", ""
    return f"# about {rough(teacher)}", f"# about {rough(student)}"
