"""``ackd export``: write the plain student of a run to files, each compared with it on images of the run's data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from torch import nn

from ackd_lightning.commands.export_int8 import check_int8, int8_advice, show_int8
from ackd_lightning.commands.student import check_data, read_student
from ackd_lightning.deploy.checking import SINGLE, Check, images_of, is_other, random_images
from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.exporting import check_free, export, measured, reading_uint8
from ackd_lightning.deploy.formats.formats import BY_ENDING, FORMATS, Format, file_size, find_format
from ackd_lightning.deploy.formats.safetensors import DTYPES
from ackd_lightning.deploy.int8 import Measured, export_int8, fine_tuned, int8_network
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.errors import ACKDError, near_matches
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.models.copies import image_channels
from ackd_lightning.models.quantization import CALIBRATION_IMAGES
from ackd_lightning.models.zoo.complexity import count_parameters, multiply_adds
from ackd_lightning.runs.console import show_table
from ackd_lightning.runs.files import Which, find_checkpoint, run_folder


def export_command(
    run: str,
    *,
    which: Which,
    out: str | None,
    overwrite: bool,
    learner: int = 0,
    formats: Sequence[str] = (),
    dtype: str = "float32",
    with_preprocessing: bool = False,
    check: Literal["data", "random"] = "data",
    int8: bool = False,
    calibrate: int | None = None,
    options: Sequence[str] = (),
) -> None:
    """Write the student, or a peer, to files and print how they compare with it, and its cost.

    Args:
        run: Run folder or checkpoint.
        which: Checkpoint of a run folder.
        out: File to write, without its ending for several formats; None: ``student-WHICH`` in the run's folder.
        overwrite: Whether to replace existing files.
        learner: Number of the learner: 0 for the student, from 1 for a peer.
        formats: Names of formats; default: that of the ending of ``out``, else safetensors.
        dtype: Type of the weights in safetensors.
        with_preprocessing: Whether the network reads uint8 images.
        check: Images that files are compared on.
        int8: Whether the network computes in int8.
        calibrate: Number of training images that an int8 network is calibrated on; default: 512.
        options: Options of the run's data, such as ``--data.root``.

    Raises:
        ACKDError: For wrong options, and for files that were not written.
    """
    checkpoint = find_checkpoint(run, which)
    kinds = _formats(formats, out)
    _check_options(kinds, dtype, with_preprocessing, options)
    if int8:
        check_int8(kinds, calibrate, learner)
    elif calibrate is not None:
        raise ACKDError("--calibrate is given and --int8 is not; add --int8, or leave --calibrate out")
    folder = run_folder(checkpoint)
    stem = folder / f"student{learner or ''}-{checkpoint.stem}{'-int8' if int8 else ''}"
    targets = _targets(kinds, out, stem, dtype, with_preprocessing)
    student = read_student(run, which, learner)
    network, description = student.network, student.description
    if student.own and any(kind.name == "safetensors" for kind in kinds):
        raise ACKDError(
            f"the student is {description.model}, a network of your own, which a .safetensors file cannot rebuild; "
            "choose a --format that holds the whole network, such as onnx"
        )
    for kind, target in zip(kinds, targets, strict=True):
        kind.check_libraries()
        check_writable(target.parent, "the folder of --out,")
        check_free(kind, target, overwrite=overwrite)
    data = None if check == "random" else check_data(checkpoint, description, options)
    images = random_images(description) if data is None else images_of(data)
    if with_preprocessing:
        prepared = reading_uint8(network, description)
        images = images.as_uint8(Preprocessing(description))
    reference = images.logits(network)
    if not bool(reference.isfinite().all()):
        raise ACKDError(
            "the student's logits are not finite, as training diverged, and nothing was written: lower the learning "
            "rate, or export another checkpoint (--which best)"
        )
    description = measured(description, images, reference)
    print(f"comparing logits on {images.words}")
    right = images.accuracy(reference)
    if right is not None and images.may_be_chance(reference):
        print(f"the student is right for {right:.2%} of {images.counted_words}, which guessing could reach, too")
    known = next((each.value for each in description.accuracy if each.part == images.part), None)
    if right is not None and known is not None and is_other(right, known, images.counted):
        print(
            f"the run measured {known:.2%} and the student is right for {right:.2%} of {images.counted_words}: compare "
            "the data and the order of their classes with those of the run before you use the file"
        )
    if int8:
        tuned = fine_tuned(student.content, checkpoint, network)
        if tuned is not None and calibrate is not None:
            raise ACKDError("--calibrate is given and the student was fine-tuned for int8 already; leave it out")
        advice = int8_advice(folder, student.summary, tuned=tuned is not None)
        own = description.replace(reads="uint8") if with_preprocessing else description

        def one(kind: Format, target: Path) -> tuple[Measured, Measured]:
            quantised, words = int8_network(network, tuned, kind.name, data, count=calibrate or CALIBRATION_IMAGES)
            return export_int8(
                network,
                quantised,
                words,
                own,
                target,
                kind,
                images=images,
                reference=reference,
                advice=advice,
                overwrite=overwrite,
            )

        show_int8(kinds, targets, one, images=images, advice=advice)
        return
    checks: dict[Path, Check] = {}
    failures: list[str] = []
    for kind, target in zip(kinds, targets, strict=True):
        module, own = network, description
        if kind.name == "safetensors":
            own = description.replace(dtype=dtype)
        elif with_preprocessing:
            module, own = prepared, description.replace(reads="uint8")
        try:
            checks[target] = export(module, own, target, kind, images=images, reference=reference, overwrite=overwrite)
        except ACKDError as error:
            failures.append(str(error))
    if checks:
        _show(checks, network, description, student.plain_parameters, student.summary)
    if failures:
        raise ACKDError("\n".join(failures))


def _formats(names: Sequence[str], out: str | None) -> list[Format]:
    if names:
        return [find_format(name) for name in dict.fromkeys(names)]
    if out is None or not Path(out).suffix:
        return [FORMATS["safetensors"]]
    ending = Path(out).suffix.lower()
    if ending not in BY_ENDING:
        raise ACKDError(f"--out is {out}; name a file that ends in {', '.join(BY_ENDING)}, or pass --format")
    return [BY_ENDING[ending]]


def _check_options(kinds: Sequence[Format], dtype: str, with_preprocessing: bool, options: Sequence[str]) -> None:
    names = {each.name for each in kinds}
    if dtype not in DTYPES:
        raise ACKDError(f"--dtype is {dtype!r}; {near_matches(dtype, DTYPES)}")
    if dtype != "float32" and "safetensors" not in names:
        raise ACKDError(f"--dtype {dtype} applies to safetensors alone; add it to --format, or leave --dtype out")
    if with_preprocessing and "safetensors" in names:
        raise ACKDError(
            "--with-preprocessing is given and safetensors holds weights alone; choose other formats, such as "
            "--format onnx"
        )
    for option in options:
        if option.startswith("-") and not option.startswith("--data"):
            raise ACKDError(f"{option} is unknown to `ackd export`; see `ackd export --help`")
    if options and options[0] in FORMATS:
        raise ACKDError(
            f"{options[0]} stands after a space and is read as a second run; separate formats by commas: --format "
            f"{','.join(dict.fromkeys([*names, *(each for each in options if each in FORMATS)]))}"
        )
    if options and not options[0].startswith("-"):
        raise ACKDError(f"{options[0]} is unknown to `ackd export`; name one run, and see `ackd export --help`")


def _targets(kinds: Sequence[Format], out: str | None, stem: Path, dtype: str, with_preprocessing: bool) -> list[Path]:
    if out is None:
        marks = {kind: f"-{dtype}" if kind.name == "safetensors" and dtype != "float32" else "" for kind in kinds}
        more = "-uint8" if with_preprocessing else ""
        return [stem.with_name(f"{stem.name}{marks[kind]}{more}{kind.ending}") for kind in kinds]
    path = Path(out)
    if len(kinds) > 1:
        if path.suffix.lower() in BY_ENDING:
            raise ACKDError(
                f"--out is {out} and there are {len(kinds)} formats; give a name without an ending, such as "
                f"{path.with_suffix('')}"
            )
        if path.is_dir():
            raise ACKDError(f"--out is {out}, a folder; give the name of the files in it, such as {path / 'student'}")
        return [path.with_name(path.name + kind.ending) for kind in kinds]
    upper = kinds[0].name == "openvino" and path.suffix != kinds[0].ending  # its library takes no other letters
    if path.suffix.lower() != kinds[0].ending or upper or path.is_dir():
        raise ACKDError(f"--out is {out}; name a file that ends in {kinds[0].ending}")
    return [path]


def _show(
    checks: dict[Path, Check], network: nn.Module, description: Description, plain: int, summary: dict[str, Any]
) -> None:
    table = Table(title=f"files in {next(iter(checks)).parent}")
    for column in ("file", "MB", "largest logit difference", "same class", "accuracy before", "after"):
        table.add_column(column, justify="left" if column == "file" else "right", overflow="fold")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.2%}"

    for path, check in checks.items():
        difference = f"{check.difference:.2g}"
        row = (
            f"{file_size(path) / 1e6:.2f}",
            difference,
            percent(check.agreement),
            percent(check.before),
            percent(check.after),
        )
        table.add_row(path.name, *row)
    show_table(table)
    for path, check in checks.items():
        if check.single:
            print(SINGLE.format(path.name))
    costs = Table()
    for column in ("network", "parameters", "multiply-adds"):
        costs.add_column(column, justify="left" if column == "network" else "right")
    adds = multiply_adds(network, description.input_size, image_channels(network))
    if teacher := summary.get("teacher"):
        costs.add_row(f"teacher {teacher['model']}", f"{teacher['parameters']:,}", f"{teacher['multiply_adds']:,}")
    if "training_parameters" in summary:
        costs.add_row("everything that was trained", f"{summary['training_parameters']:,}", "")
    if plain != count_parameters(network):
        costs.add_row("student with its own classifier", f"{plain:,}", "")
    exported = "exported peer" if "learner" in description.origin else "exported student"
    costs.add_row(exported, f"{count_parameters(network):,}", f"{adds:,}")
    show_table(costs)
