"""A folder of class folders with as many images as ImageNet: time to the first batch, and memory, at two starts.

    python benchmarks/large_folder.py --files 1280000

The files are names (hard links) of one JPEG for each class in a temporary folder, which is removed at the end. A start
is a fresh process, from its begin to the first training batch; only the first one opens every file. README.md in this
folder explains the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASSES = 1000
LINKS = 60_000
"""Most names of a file; ext4 allows 65,000."""
BYTES_OF_A_NAME = 64


def write_folder(root: Path, files: int) -> None:
    """Write class folders with ``files`` names in all."""
    from PIL import Image

    noise = Image.effect_noise((63, 47), 80).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
    each = max(2, files // CLASSES)
    for part, count in (("train", each), ("test", 1)):
        for number in range(CLASSES):
            folder = root / part / f"n{number:08d}"
            folder.mkdir(parents=True)
            first = folder / "00000000.JPEG"
            noise.save(first, quality=90)
            place = os.open(folder, os.O_RDONLY)
            for link in range(1, min(count, LINKS)):
                os.link(first.name, f"{link:08d}.JPEG", src_dir_fd=place, dst_dir_fd=place)
            os.close(place)


def start(root: str, workers: int, began: float) -> dict[str, float]:
    """Read the folder as a training does, up to its first batch."""
    from ackd_lightning.data import ImageFolderDataModule

    imported = time.time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = ImageFolderDataModule(root, image_size=224, batch_size=128, num_workers=workers)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch.image.shape == (128, 3, 224, 224)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.time() - began,
        "seconds of imports": imported - began,
        "processor seconds": usage.ru_utime + usage.ru_stime,
        "memory of the main process, MB": usage.ru_maxrss / 1024,
        "of which imports, MB": before / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_280_000, help="number of training images")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder is made")
    parser.add_argument("--start", default=None, help=argparse.SUPPRESS)  # the fresh process of one start
    options = parser.parse_args()
    if options.start is not None:
        print(json.dumps(start(**json.loads(options.start))))
        return
    with tempfile.TemporaryDirectory(prefix="ackd-folder-", dir=options.folder) as folder:
        disk = os.statvfs(folder)
        needed = options.files * BYTES_OF_A_NAME + CLASSES * 2 * 100_000
        if disk.f_bavail * disk.f_frsize < 2 * needed or 0 < disk.f_favail < 10 * CLASSES:
            sys.exit(f"{folder} has too little room: {needed / 1e6:.0f} MB and {4 * CLASSES} inodes are needed")
        write_folder(Path(folder), options.files)
        for which in ("first start", "second start"):
            request = json.dumps({"root": folder, "workers": options.workers, "began": time.time()})
            done = subprocess.run(
                [sys.executable, __file__, "--start", request], stdout=subprocess.PIPE, text=True, check=True
            )
            values = json.loads(done.stdout.splitlines()[-1])
            print(f"{which}: " + ", ".join(f"{value:.1f} {name}" for name, value in values.items()), flush=True)


if __name__ == "__main__":
    main()
