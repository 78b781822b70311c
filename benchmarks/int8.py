"""Accuracy, size and latency of students in float32, calibrated to int8, and fine-tuned for int8 by the teacher.

Trains what is missing and goes on where it stopped. For each seed: the student, its fine-tuning with ``qat.yaml`` in
float32 and with rounding, and the files of all; then one table over the seeds, on all test images of the data. The
fine-tuned float32 network shows what longer training does without rounding:

    python benchmarks/int8.py --config cifar100_resnet110_resnet20.yaml --out int8 --seeds 2 [settings of `ackd fit`]

The teacher's weights must be there. The machine should do nothing else while latency is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from ackd_lightning.cli import main as ackd
from ackd_lightning.config.files import find_config
from ackd_lightning.deploy.files import open_network
from ackd_lightning.deploy.latency import measure
from ackd_lightning.launch.run_data import data_of_run


def run_once(done: Path, *arguments: str) -> None:
    """Run a command unless its result is there."""
    if not done.exists() and ackd(list(arguments)) != 0:
        raise SystemExit(f"failed: ackd {' '.join(arguments)}")


@torch.no_grad()
def accuracy(path: Path, checkpoint: Path, options: list[str]) -> float:
    """Share of the test images for which a file is right."""
    opened = open_network(path)
    data = data_of_run(checkpoint, options, opened.description.class_names)
    right = count = 0
    for raw in data.test_dataloader():
        batch = data.on_after_batch_transfer(raw, 0)
        right += int((opened.logits(batch.image).argmax(1) == batch.target).sum())
        count += len(batch.target)
    return right / count


ROWS = {
    "float32": ("plain", False),
    "int8 PTQ": ("plain", True),
    "float32, fine-tuned": ("tuned", False),
    "fine-tuned, int8 PTQ": ("tuned", True),
    "fine-tuned by QAT, int8": ("qat", True),
}
"""Run that a row exports, and whether as int8."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration with a teacher")
    parser.add_argument("--method", default="kd", help="method that trains the student; kd fine-tunes it")
    parser.add_argument("--out", type=Path, default=Path("int8"), help="folder of runs, files and result.json")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--formats", default="onnx,pte")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the fine-tuning")
    arguments, settings = parser.parse_known_args()
    out, rows = arguments.out, []
    kernels = {"onnx": "x86", "pt2": "x86", "pte": "xnnpack"}
    options = [each for each in settings if each.startswith("--data.")]  # as --data.root=FOLDER
    stem = Path(find_config(arguments.config)).stem
    common = ["fit", "--config", arguments.config, "--runs_dir", str(out / "runs")]
    for seed in range(arguments.seeds):
        plain = out / "runs" / f"{stem}+{arguments.method}" / f"seed{seed}"
        chosen = ["--config", f"{arguments.method}.yaml", "--name", plain.name, "--seed_everything", str(seed)]
        run_once(plain / "summary.json", *common, *chosen, *settings)
        for kind in arguments.formats.split(","):
            runs = {"plain": plain}
            for run, quantization in (("tuned", "null"), ("qat", kernels[kind])):
                runs[run] = out / "runs" / f"{stem}+qat" / f"seed{seed}-{quantization}"
                run_once(
                    runs[run] / "summary.json",
                    *[*common, "--config", "qat.yaml", *settings],
                    *["--name", runs[run].name, "--seed_everything", str(seed)],
                    *["--model.student.weights", str(plain / "student.safetensors")],
                    *["--model.student.quantization", quantization, "--trainer.max_epochs", str(arguments.epochs)],
                )
            for number, (row, (run, int8)) in enumerate(ROWS.items()):
                path = out / f"seed{seed}-{number}.{kind}"
                form = ["--format", kind, *(["--int8"] if int8 else []), *options]
                run_once(path, "export", str(runs[run]), "--out", str(path), *form)
                opened = open_network(path)
                time = measure(opened.logits, opened.description.image_shape, seconds=3)
                found = accuracy(path, runs[run] / "checkpoints" / "last.ckpt", options)
                values = {"seed": seed, "format": kind, "network": row, "accuracy": found}
                rows.append({**values, "bytes": path.stat().st_size, "ms": 1000 * time.median, "threads": time.threads})
    (out / "result.json").write_text(json.dumps(rows, indent=2))
    print("| format | network | test accuracy in %, each seed | MB | ms an image, median over the seeds |")
    print("|---|---|---|---|---|")
    for kind in arguments.formats.split(","):
        for row in ROWS:
            own = [each for each in rows if each["format"] == kind and each["network"] == row]
            shares = ", ".join(f"{100 * each['accuracy']:.2f}" for each in own)
            print(
                f"| {kind} | {row} | {shares} | {own[0]['bytes'] / 1e6:.2f} | "
                f"{statistics.median(each['ms'] for each in own):.2f} |"
            )


if __name__ == "__main__":
    main()
