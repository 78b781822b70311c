"""Accuracy, size and latency of students in float32, calibrated to int8, and fine-tuned for int8 by the teacher.

Trains what is missing and goes on where it stopped. For each seed: the student, its fine-tuning with ``qat.yaml``, and
the files of both; then one table over the seeds, on all test images of the data:

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration with a teacher")
    parser.add_argument("--out", type=Path, default=Path("int8"), help="folder of runs, files and result.json")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--formats", default="onnx,pte")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of the fine-tuning")
    arguments, settings = parser.parse_known_args()
    formats, out = arguments.formats.split(","), arguments.out
    kernels = {"onnx": "x86", "pt2": "x86", "pte": "xnnpack"}
    options = [each for each in settings if each.startswith("--data.")]  # as --data.root=FOLDER
    common = ["fit", "--config", arguments.config, "--config", "kd.yaml", "--runs_dir", str(out / "runs")]
    stem, rows = Path(find_config(arguments.config)).stem, []
    for seed in range(arguments.seeds):
        name = ["--name", f"seed{seed}", "--seed_everything", str(seed)]
        plain = out / "runs" / f"{stem}+kd" / f"seed{seed}"
        run_once(plain / "summary.json", *common, *name, *settings)
        for kind in formats:
            float32, calibrated = out / f"seed{seed}.{kind}", out / f"seed{seed}-ptq.{kind}"
            tuned_file = out / f"seed{seed}-qat.{kind}"
            export = ["--format", kind, *options]
            run_once(float32, "export", str(plain), "--out", str(float32), *export)
            run_once(calibrated, "export", str(plain), "--int8", "--out", str(calibrated), *export)
            tuned = out / "runs" / f"{stem}+kd+qat" / f"seed{seed}-{kernels[kind]}"
            run_once(
                tuned / "summary.json",
                *common,
                "--config",
                "qat.yaml",
                *["--name", tuned.name, "--seed_everything", str(seed), *settings],
                *["--model.student.weights", str(plain / "student.safetensors")],
                *["--model.student.quantization", kernels[kind], "--trainer.max_epochs", str(arguments.epochs)],
            )
            run_once(tuned_file, "export", str(tuned), "--int8", "--out", str(tuned_file), *export)
            for row, path in (("float32", float32), ("int8 PTQ", calibrated), ("int8 QAT with teacher", tuned_file)):
                opened = open_network(path)
                time = measure(opened.logits, opened.description.image_shape, seconds=3)
                found = accuracy(path, plain / "checkpoints" / "last.ckpt", options)
                values = {"seed": seed, "format": kind, "network": row, "accuracy": found}
                rows.append({**values, "bytes": path.stat().st_size, "ms": 1000 * time.median, "threads": time.threads})
    (out / "result.json").write_text(json.dumps(rows, indent=2))
    print("| format | network | test accuracy in %, each seed | MB | ms an image, median over the seeds |")
    print("|---|---|---|---|---|")
    for kind in formats:
        for row in ("float32", "int8 PTQ", "int8 QAT with teacher"):
            own = [each for each in rows if each["format"] == kind and each["network"] == row]
            shares = ", ".join(f"{100 * each['accuracy']:.2f}" for each in own)
            print(
                f"| {kind} | {row} | {shares} | {own[0]['bytes'] / 1e6:.2f} | "
                f"{statistics.median(each['ms'] for each in own):.2f} |"
            )


if __name__ == "__main__":
    main()
