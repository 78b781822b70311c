"""``ackd push``: send the student of a run to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ackd_lightning.commands.student import Student, check_data, read_student
from ackd_lightning.deploy.checking import images_of, random_images
from ackd_lightning.deploy.exporting import export, measured
from ackd_lightning.deploy.files import open_network
from ackd_lightning.deploy.formats.formats import FORMATS
from ackd_lightning.deploy.hub import CARD, CONFIG, for_timm, model_card, push, require_token, write_config
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.hub import HF, WEIGHTS, parse_repository
from ackd_lightning.models.weight_files import tell
from ackd_lightning.runs.export import weights_mark
from ackd_lightning.runs.files import Which, run_folder


def push_command(
    run: str,
    repository: str,
    *,
    which: Which,
    private: bool,
    license_name: str,
    check: Literal["data", "random"] = "data",
    options: Sequence[str] = (),
) -> None:
    """Check the student on images of its data, and send weights, model card and configuration.

    Args:
        run: Run folder or checkpoint.
        repository: ``USER/NAME`` on the hub.
        which: Checkpoint of a run folder.
        private: Whether a new repository is private.
        license_name: Licence of the weights, by the hub's name.
        check: Images that the file is compared on.
        options: Options of the run's data, such as ``--data.root``.

    Raises:
        ACKDError: If the name is not one of a repository, there is no token, or the hub refuses it.
    """
    name, revision = parse_repository(repository)
    if revision is not None:
        raise ACKDError(f"{repository} names a revision, and a student is sent to the newest; leave it out")
    student = read_student(run, which)
    local = student.description.model.startswith(HF)
    if student.own or local:
        whose = "whose settings are in a folder of yours" if local else "a network of your own"
        raise ACKDError(
            f"the student is {student.description.model}, {whose}, which a weight file on the hub could not rebuild; "
            "export it with --format onnx and send that file with the hub's own program"
        )
    require_token(name)
    if check == "random":
        images = random_images(student.description)
    else:
        images = images_of(check_data(student.checkpoint, student.description, options))
    reference = images.logits(student.network)
    description = measured(student.description, images, reference)
    report = _report_of(student, options)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / each for each in (WEIGHTS, CARD, CONFIG)]
        export(student.network, description, files[0], FORMATS["safetensors"], images=images, reference=reference)
        description = open_network(files[0]).description  # with how it was checked
        files[1].write_text(model_card(description, name, license_name=license_name, report=report), encoding="utf-8")
        write_config(description, files[2], license_name=license_name)
        url = push(files, name, private=private, message=f"{description.model}, {student.checkpoint.stem} epoch")
    tell(f"{url}: {', '.join(each.name for each in files)}; licence {license_name}")
    also = f', or timm.create_model("hf-hub:{name}", pretrained=True)' if for_timm(description) else ""
    tell(f'load it with load_student("hf:{name}"){also}')


def _report_of(student: Student, options: Sequence[str] = ()) -> str | None:
    """Text of the report in the run's folder; None without one, or if it is about something else, which is said."""
    folder = run_folder(student.checkpoint) / "report"
    if not (folder / "report.md").is_file():
        return None
    words = "is about other weights"
    with contextlib.suppress(OSError, ValueError):
        about = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            about = {}
        if about.get("measured_otherwise") == "images":
            tell(f"{folder} is about other images than those of the run and is not part of the card")
            return None
        if about.get("measured_otherwise"):
            words = "was measured with other settings than the run has"
        elif about.get("weights") == weights_mark(student.content):
            return (folder / "report.md").read_text(encoding="utf-8")
    tell(
        f"{folder} {words} and is not part of the card; write a new one with "
        f"`{shlex.join(['ackd', 'report', str(student.checkpoint), *options])}`"
    )
    return None
