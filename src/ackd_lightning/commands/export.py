"""``ackd export``: write the plain student of a run to a file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.preflight import check_writable
from ackd_lightning.models.copies import image_channels
from ackd_lightning.models.zoo.complexity import count_parameters, multiply_adds
from ackd_lightning.runs.export import export_student
from ackd_lightning.runs.files import Which, find_checkpoint, read_summary, run_folder


def export_command(run: str, *, which: Which, out: str | None, overwrite: bool, learner: int = 0) -> None:
    """Write the student, or a peer, to a file and print its cost.

    Args:
        run: Run folder or checkpoint.
        which: Checkpoint of a run folder.
        out: File to write; None: ``student-WHICH.safetensors`` in the run's folder.
        overwrite: Whether to replace an existing file.
        learner: Number of the learner: 0 for the student, from 1 for a peer.
    """
    checkpoint = find_checkpoint(run, which)
    folder = run_folder(checkpoint)
    target = Path(out) if out else folder / f"student{learner or ''}-{checkpoint.stem}.safetensors"
    if target.suffix != ".safetensors" or target.is_dir():
        raise ACKDError(f"--out is {target}; name a file that ends in .safetensors")
    summary = read_summary(folder) if (folder / "summary.json").is_file() else {}
    values = summary.get(checkpoint.stem, {})
    ending = f"/aux{learner}_acc" if learner else "/acc"
    metadata = {f"{key.split('/')[0]}_acc": f"{value:.6f}" for key, value in values.items() if key.endswith(ending)}
    check_writable(target.parent, "the folder of --out,")
    extra = {**metadata, "weights": f"{checkpoint.stem} epoch"}
    exported = export_student(checkpoint, target, learner=learner, extra=extra, overwrite=overwrite)
    print(f"{target}: logits as in training, largest difference {exported.largest_difference:.1g}")
    table = Table()
    for column in ("network", "parameters", "multiply-adds"):
        table.add_column(column, justify="left" if column == "network" else "right")
    adds = multiply_adds(exported.network, exported.input_size, image_channels(exported.network))
    if teacher := summary.get("teacher"):
        table.add_row(f"teacher {teacher['model']}", f"{teacher['parameters']:,}", f"{teacher['multiply_adds']:,}")
    if "training_parameters" in summary:
        table.add_row("everything that was trained", f"{summary['training_parameters']:,}", "")
    if exported.plain_parameters != count_parameters(exported.network):
        table.add_row("student with its own classifier", f"{exported.plain_parameters:,}", "")
    table.add_row("exported student", f"{count_parameters(exported.network):,}", f"{adds:,}")
    Console(width=100).print(table)
