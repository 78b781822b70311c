"""``ackd report``: one page about the student of a run, or about an exported file."""

from __future__ import annotations

import contextlib
import datetime
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ackd_lightning.commands.student import chosen_device, reading, trained
from ackd_lightning.data.arguments import full_signature
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.deploy.files import ENDINGS, open_network
from ackd_lightning.deploy.report.elements import FIGURES
from ackd_lightning.deploy.report.measuring import measure, validation_logits
from ackd_lightning.deploy.report.page import HEAD
from ackd_lightning.deploy.report.subject import Subject, exported_files, of_file, of_run
from ackd_lightning.deploy.report.writing import assemble, write
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.execute import in_our_words
from ackd_lightning.launch.lightning import ACKDCLI
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.launch.run_settings import changed_test
from ackd_lightning.metrics.intervals import share_text
from ackd_lightning.models.hub import is_hub_name
from ackd_lightning.models.weight_files import local_file
from ackd_lightning.runs.claim import say_unfinished
from ackd_lightning.runs.export import weights_mark
from ackd_lightning.runs.files import Which, find_checkpoint, read_checkpoint, read_summary, run_folder
from ackd_lightning.runs.versions import cpu_name, versions

_TRAINING = ("seconds", "epochs", "steps", "training_parameters", "device", "precision", "seed", "skipped_steps")


def report_command(
    run: str,
    *,
    out: str | None = None,
    which: Which = "last",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    latency: bool = True,
    settings: Sequence[str] = (),
) -> None:
    """Measure a trained network on its test set and write a page about it.

    Args:
        run: Run folder, checkpoint, exported file, or ``hf:USER/NAME`` on the hub.
        out: Folder of the page; None: ``report`` in the folder of the run, ``NAME-report`` beside a file, or in the
            current folder for one on the hub.
        which: Checkpoint of a run folder.
        device: Device that predicts; ``auto`` is a GPU where there is one.
        latency: Whether speed is measured.
        settings: Settings of `ackd fit` that name or change the data.

    Raises:
        ACKDError: If the network, its data or the folder are not usable.
    """
    remote = is_hub_name(run)
    path = local_file(run) if remote else Path(run)
    is_file = path.suffix.lower() in ENDINGS
    chosen = chosen_device(device)
    folder = path.parent if is_file else run_folder(find_checkpoint(run, which))
    has_run = not remote and (folder / "config.yaml").is_file() and (not is_file or (folder / "checkpoints").is_dir())
    if is_file and not has_run and not any(each.startswith(("--config", "-c", "--data")) for each in settings):
        raise ACKDError(
            f"{run} is not in the folder of a run, so its test data are unknown; name them, as in --config "
            "data/digits.yaml, or --data ackd_lightning.data.ImageFolderDataModule --data.root FOLDER"
        )
    place = Path() if remote else folder
    target = Path(out) if out else place / (f"{path.stem}-report" if is_file else "report")
    _check_folder(target)
    measure_on = ([torch.device("cpu")] + ([chosen] if chosen.type != "cpu" else [])) if latency else []
    with in_our_words(settings):
        if is_file:
            data, subject = _file(path, folder if has_run else None, which, settings, measure_on, chosen)
        else:
            data, subject = _run(run, which, settings, measure_on, chosen)
    summary = read_summary(folder) if (folder / "summary.json").is_file() else {}
    asked: dict[str, Callable[[Tensor], Tensor]] = {}
    if has_run:
        costs, asked, notes = exported_files(folder, data.info, skip=path if is_file else None, timed=latency)
        subject.costs += costs
        subject.notes += notes
    measured = measure(data, subject.run, chosen, files=asked)
    validation = None if data.val_is_test else validation_logits(data, subject.run, chosen)
    found, shown = assemble(
        subject,
        measured,
        data.info,
        validation=validation,
        no_temperature="no validation data are held out (data.val_fraction is 0)",
        device=chosen,
    )
    found["network"]["data"] = found["network"].get("data") or type(data).__name__
    found |= {
        "source": run,
        "weights": subject.facts.get("weights"),
        "measured_otherwise": subject.facts.get("otherwise", ""),
        "training": {key: summary[key] for key in _TRAINING if key in summary},
        "machine": _machine(),
        "versions": {key: each for key, each in versions().items() if each},
        "command": shlex.join(["ackd", "report", run, *([] if which == "last" else ["--which", which]), *settings]),
        "date": datetime.date.today().isoformat(),
    }
    write(found, shown, target)
    student = found["accuracy"]["student"]
    print(f"accuracy {share_text(student['right'], found['images'])} of {found['images']:,} test images")
    for note in [*found["notes"], *([f"no Grad-CAM: {found['no_gradcam']}"] if found["no_gradcam"] else [])]:
        print(note)
    print(f"report: {target / 'report.html'}, {target / 'report.md'}, {target / 'report.json'}", flush=True)


def _check_folder(target: Path) -> None:
    there = [each.name for each in target.iterdir()] if target.is_dir() else []
    if target.is_file() or (any(not name.startswith(".") for name in there) and not _is_report(target, there)):
        raise ACKDError(f"--out {target} exists and is not a report; choose another folder")
    check_writable(target, "--out")


def _is_report(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder has a report of this package, also one that was not written to the end."""
    with contextlib.suppress(OSError, ValueError):
        if "report.json" in names:  # that is written last
            about = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            return isinstance(about, dict) and str(about.get("command", "")).startswith("ackd report ")
        parts = {FIGURES} if "report.md" not in names else {FIGURES, "report.md", "report.html"}
        ours = "report.md" not in names or (folder / "report.md").read_text(encoding="utf-8").startswith(HEAD)
        return ours and all(name in parts or name.startswith(".") for name in names)
    return False


def _prepared(cli: ACKDCLI, names: Sequence[str] | None) -> ImageDataModule:
    """Set up the data with the classes in the order of the network."""
    data = cli.images
    data.prepare_data()
    data.setup("test")
    if names and data.class_names and tuple(names) != data.class_names and data.use_class_order(tuple(names)):
        print("classes of the data are reordered to those of the network")
    return data


def _run(
    run: str, which: Which, settings: Sequence[str], measure_on: Sequence[torch.device], device: torch.device
) -> tuple[ImageDataModule, Subject]:
    checkpoint = find_checkpoint(run, which)
    say_unfinished(checkpoint)
    content = read_checkpoint(checkpoint)
    cli = trained(checkpoint, content, settings)
    module = cli.model
    data = _prepared(cli, content["ackd_lightning"].get("class_names"))
    folder = run_folder(checkpoint)
    notes, otherwise = _otherwise(folder, content, cli, data)
    try:
        module.load_teacher()
        module.match_classes(data)
    except ACKDError as error:
        module.teachers.release()  # one that is loaded may have other classes
        notes.append(f"the teacher is left out: {error}")
    summary: dict[str, Any] = read_summary(folder) if (folder / "summary.json").is_file() else {}
    subject = of_run(module, data.info, summary, measure_on=measure_on)
    module.to(device)
    subject.notes[:0] = notes
    subject.about["checkpoint"] = str(checkpoint)
    subject.facts["weights"] = weights_mark(content)
    subject.facts["otherwise"] = otherwise
    return data, subject


def _otherwise(
    folder: Path, content: dict[str, Any], cli: ACKDCLI, data: ImageDataModule
) -> tuple[list[str], Literal["", "images", "settings"]]:
    """What is measured otherwise than a run was trained and tested: sentences, and the worst kind of it."""
    moved, same = data.say_changed(content["ackd_lightning"].get("images") or {}), data.as_trained
    changed = changed_test(folder, cli.settings(), same_images=same) if (folder / "config.yaml").is_file() else []
    settings = f"measured with other settings than the run has: {', '.join(changed)}" if changed else ""
    return list(filter(None, [settings, moved])), "images" if moved else "settings" if changed else ""


def _file(
    path: Path,
    folder: Path | None,
    which: Which,
    settings: Sequence[str],
    measure_on: Sequence[torch.device],
    device: torch.device,
) -> tuple[ImageDataModule, Subject]:
    network = open_network(path, which=which, device=device)
    if folder is not None:
        cli = ACKDCLI("test", ["--config", str(folder / "config.yaml"), *settings])
    else:
        cli = ACKDCLI("test", [*settings, "--model.student", network.description.model], needs_run=False)
    cli.build_data()
    data = _prepared(cli, network.description.class_names)
    options = full_signature(type(data)).parameters
    for name, (here, there) in reading(data, network.description).items():
        if here != there and (name != "background" or name in options):  # else no image is transparent
            remedy = f"set --data.{name} to that" if name in options else "name images of that kind"
            raise ACKDError(f"{name} of the data is {here} and was {there} when {path} was trained; {remedy}")
    subject = of_file(network, data.info, measure_on=measure_on)
    if folder is not None and (checkpoint := folder / "checkpoints" / f"{which}.ckpt").is_file():
        try:
            subject.notes[:0], subject.facts["otherwise"] = _otherwise(folder, read_checkpoint(checkpoint), cli, data)
        except ACKDError as error:
            subject.notes.insert(0, f"whether its run was trained with the same images is unknown: {error}")
    return data, subject


def _machine() -> str:
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return " and ".join([cpu_name(), *gpu])
