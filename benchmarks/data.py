"""Images per second of our data pipelines and of torchvision's usual ones, in pairs, on the CPU of an idle machine.

    python benchmarks/data.py --pairs 5

Every pair runs each side once in a fresh process (A B A B over the pairs): images of 32 x 32 in memory, then JPEG files
of about 500 x 375 and photos of 4000 x 3000 that become 224 x 224. All sides end at the float batch that a network
receives. A pair with load of other processes is discarded and repeated. README.md in this folder explains the numbers.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from timing.machine import machine, median_and_range, watched
from timing.synthetic import SyntheticDataModule
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from ackd_lightning.data import CIFAR100DataModule, ImageDataModule, ImageFolderDataModule
from ackd_lightning.runs.files import write_json
from ackd_lightning.training.speed import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
MEMORY_BATCH, FILE_BATCH = 128, 64
SIZES = {"files": (500, 375, 4), "photos": (4000, 3000, 40)}
"""Width, height, and names of each file: the epoch is long and the folder small."""
DETAIL = ((4, 45.0), (16, 25.0), (64, 15.0), (250, 10.0))
"""Noise of an image: cells across the image, strength in grey levels."""


# ---------------------------------------------------------------- images


def write_images(root: Path, count: int, long: int, short: int, links: int) -> None:
    """Write smooth random JPEGs: ``train`` with ``count`` names, ``links`` of each file, and a few in ``test``."""
    draw = np.random.default_rng(0)
    for number in range(-4, count // links):
        width, height = (long, short) if number % 4 else (short, long)
        pixels = np.full((height, width, 3), 128.0)
        for (cells, strength), channel in itertools.product(DETAIL, range(3)):
            noise = draw.normal(0, strength, (cells * height // width, cells)).astype(np.float32)
            pixels[..., channel] += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
        folder = root / ("train" if number >= 0 else "test") / f"class{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        first = folder / f"{number + 4:05d}-0.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(first, quality=90)
        for link in range(1, links if number >= 0 else 1):
            first.with_name(f"{number + 4:05d}-{link}.jpg").hardlink_to(first)


class Pictures(Dataset):
    """Images in memory that become PIL images one by one, as in torchvision's CIFAR data sets."""

    def __init__(self, count: int, transform: Callable) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = [number % 100 for number in range(count)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


# ---------------------------------------------------------------- sides


def usual(crop: Callable, data: ImageDataModule) -> Callable:
    """Usual transforms of torchvision, of a PIL image or a uint8 tensor."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ToImage(), to_float, v2.Normalize(data.mean, data.std)])


def ours(data: ImageDataModule) -> Iterable:
    """Batches as a training step receives them."""
    return (data.on_after_batch_transfer(raw, 0) for raw in data.train_dataloader())


def loaded(dataset: Dataset, batch_size: int, workers: int) -> Iterable:
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True)


def small() -> ImageDataModule:
    """As many random images in memory as CIFAR-100 has."""
    return SyntheticDataModule(CIFAR100DataModule(batch_size=MEMORY_BATCH, val_fraction=0))


def large(root: Path) -> ImageDataModule:
    return ImageFolderDataModule(root, image_size=224, batch_size=FILE_BATCH, val_fraction=0, num_workers=2)


def small_usual(workers: int) -> Iterable:
    data = small()
    crop = v2.RandomCrop(data.input_size, padding=4)
    return loaded(Pictures(data.images, usual(crop, data)), MEMORY_BATCH, workers)


def as_tensor(path: str) -> torch.Tensor:
    return decode_image(path, mode=ImageReadMode.RGB)


def large_usual(root: Path, **options: Callable) -> Iterable:
    data = large(root)
    crop = v2.RandomResizedCrop(data.input_size, antialias=True)
    return loaded(ImageFolder(root / "train", usual(crop, data), **options), FILE_BATCH, data.num_workers)


SIDES = {
    "memory, ours": lambda root: ours(small()),
    "memory, torchvision": lambda root: small_usual(0),
    "memory, torchvision, 2 workers": lambda root: small_usual(2),
} | {
    f"{kind}, {name}, 2 workers": (lambda root, kind=kind, make=make: make(root / kind))
    for kind in SIZES
    for name, make in {
        "ours": lambda root: ours(large(root)),
        "torchvision": large_usual,
        "torchvision on tensors": lambda root: large_usual(root, loader=as_tensor),
    }.items()
}
RATIOS = (
    ("memory, ours", "memory, torchvision"),
    ("memory, ours", "memory, torchvision, 2 workers"),
    *((f"{kind}, ours, 2 workers", f"{kind}, torchvision, 2 workers") for kind in SIZES),
    *((f"{kind}, ours, 2 workers", f"{kind}, torchvision on tensors, 2 workers") for kind in SIZES),
)


def side(request: dict) -> dict:
    """Run an epoch of one side in this process; the first batches, while workers start, are not timed."""
    keep_freed_memory()  # as `ackd fit` does on a CPU; here for all sides alike
    batches = iter(SIDES[request["side"]](Path(request["root"])))
    for _ in range(request["warmup"]):
        next(batches)
    begin, images = time.perf_counter(), 0
    for image, *_ in batches:
        images += len(image)
    seconds = time.perf_counter() - begin
    assert image.dtype == torch.float32
    return {"images_per_second": images / seconds, "images": images, "seconds": seconds, "machine": machine()}


def profile(root: Path) -> None:
    """Print where the time of our files goes, in one process without workers."""
    torch.set_num_threads(1)
    keep_freed_memory()
    data = large(root / "files")
    data.num_workers = 0
    batches = ours(data)
    next(iter(batches))
    with cProfile.Profile() as found:
        images = sum(len(image) for image, *_ in batches)
    print(f"{images} images")
    pstats.Stats(found).sort_stats("tottime").print_stats(8)


# ---------------------------------------------------------------- pairs


def measure_pair(options: argparse.Namespace, root: Path) -> dict:
    """Every side once."""
    runs = {}
    for name in SIDES:
        request = {"side": name, "root": str(root), "warmup": options.warmup}
        done, load = watched([sys.executable, __file__, "--side", json.dumps(request)])
        if done.returncode:
            sys.exit(f"{name} failed: {done.stderr.strip()}")
        runs[name] = {**json.loads(done.stdout.splitlines()[-1]), "load": load}
    unknown = any(each["load"]["busy"] is None for each in runs.values())
    return {"runs": runs, "busy": any(each["load"]["busy"] for each in runs.values()), "load_known": not unknown}


def ratios(pairs: list[dict]) -> list[dict]:
    """Our images per second divided by those of torchvision, over the pairs."""
    lines = []
    for mine, theirs in RATIOS:
        speeds = [[pair["runs"][name]["images_per_second"] for name in (mine, theirs)] for pair in pairs]
        lines.append({"ratio": f"{mine} / {theirs}", **median_and_range([above / below for above, below in speeds])})
    return lines


def show(pairs: list[dict]) -> None:
    print(f"\nmedian [min, max] of {len(pairs)} pairs")
    for name in SIDES:
        values = median_and_range([pair["runs"][name]["images_per_second"] for pair in pairs])
        print(f"  {name:<56} {values['median']:9,.0f} images/s  [{values['min']:,.0f}, {values['max']:,.0f}]")
    for line in ratios(pairs):
        print(f"  {line['ratio']:<56} {line['median']:9.2f}           [{line['min']:.2f}, {line['max']:.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="number of undisturbed pairs")
    parser.add_argument(
        "--attempts", type=int, default=None, help="largest number of pairs to run; default: 3 x --pairs"
    )
    parser.add_argument("--images", type=int, default=1600, help="number of JPEG names of 500 x 375")
    parser.add_argument("--photos", type=int, default=640, help="number of JPEG names of 4000 x 3000")
    parser.add_argument("--warmup", type=int, default=4, help="untimed batches of every run")
    parser.add_argument(
        "--out", type=Path, default=None, help="raw numbers; default: benchmarks/results/data-TIME.json"
    )
    parser.add_argument("--profile", action="store_true", help="only show where the time of our files goes")
    parser.add_argument("--side", default=None, help=argparse.SUPPRESS)  # the fresh process of one side
    options = parser.parse_args()
    if options.side is not None:
        print(json.dumps(side(json.loads(options.side))))
        return
    if options.pairs < 1 or options.warmup < 1:
        parser.error("--pairs and --warmup must be 1 or more")
    least = (options.warmup + 4) * FILE_BATCH
    if min(options.images, options.photos) < least:
        parser.error(f"--images and --photos must be {least} or more, for {options.warmup} + 4 batches")
    kept: list[dict] = []
    rejected: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="ackd-data-") as folder:
        names = {"files": options.images, "photos": options.photos}
        for kind, size in SIZES.items():
            write_images(Path(folder) / kind, names[kind], *size)
        if options.profile:
            profile(Path(folder))
            return
        sizes = {
            kind: mean(path.stat().st_size for path in Path(folder).glob(f"{kind}/train/*/*-0.jpg")) for kind in SIZES
        }
        for attempt in range(options.attempts or 3 * options.pairs):
            pair = measure_pair(options, Path(folder))
            (rejected if pair["busy"] else kept).append(pair)
            speeds = ", ".join(f"{each['images_per_second']:,.0f}" for each in pair["runs"].values())
            verdict = "REJECTED, other processes were busy" if pair["busy"] else f"pair {len(kept)} of {options.pairs}"
            print(f"[{attempt + 1}] {speeds} images/s: {verdict}", flush=True)
            if len(kept) == options.pairs:
                break
    out = options.out or RESULTS / f"data-{time.strftime('%Y%m%d-%H%M%S')}.json"
    report = {
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "side", "profile")},
        "mean_file_bytes": sizes,
        "ratios": ratios(kept) if kept else [],
        "pairs": kept,
        "rejected": rejected,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(report, out)
    if not kept:
        print("\nNO PAIR WAS UNDISTURBED: do not rely on these numbers")
    show(kept or rejected)
    if not all(pair["load_known"] for pair in kept):
        print("the load of other processes is unknown on this system; make sure that the machine is idle")
    print(f"raw numbers: {out}")
    if len(kept) < options.pairs:
        sys.exit(f"only {len(kept)} of {options.pairs} pairs were undisturbed; repeat on an idle machine")


if __name__ == "__main__":
    main()
