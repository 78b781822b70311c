"""List images of Tiny-ImageNet with their classes and with groups of classes, to train on the same images with either.

``python benchmarks/group_classes.py data/tiny100 --groups 10`` writes ``data/tiny100/groups.csv``. A group is a run of
neighbouring wnids, which are near each other in WordNet.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="official layout, perhaps with fewer classes in train/")
    parser.add_argument("--groups", type=int, default=10)
    parser.add_argument("--train", type=int, default=150, help="training images of each class")
    parser.add_argument("--val", type=int, default=100, help="validation images of each class, from train/ too")
    chosen = parser.parse_args()
    classes = sorted(each.name for each in (chosen.root / "train").iterdir() if each.is_dir())
    if len(classes) % chosen.groups:
        parser.error(f"{len(classes)} classes are not {chosen.groups} equal groups")
    size = len(classes) // chosen.groups
    group = {name: f"group{number // size}" for number, name in enumerate(classes)}
    rows = []
    for name in classes:
        paths = sorted(
            (chosen.root / "train" / name / "images").iterdir(), key=lambda path: int(path.stem.split("_")[1])
        )
        for number, path in enumerate(paths[: chosen.train + chosen.val]):
            part = "train" if number < chosen.train else "val"
            rows.append((path.relative_to(chosen.root), name, group[name], part))
    lines = (chosen.root / "val/val_annotations.txt").read_text(encoding="utf-8").splitlines()
    for file, name, *_ in (line.split("\t") for line in lines):
        if name in group:
            rows.append((Path("val/images") / file, name, group[name], "test"))
    with (chosen.root / "groups.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "class", "group", "part"), *rows])
    print(f"{len(rows):,} images, {len(classes)} classes, {chosen.groups} groups: {chosen.root / 'groups.csv'}")


if __name__ == "__main__":
    main()
