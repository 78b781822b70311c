"""Everything that needs a GPU, on one that is rented for half an hour.

    python benchmarks/gpu.py pack --out packed --data cifar10=cifar10.tar.xz --data tiny=tiny-imagenet-200
    python benchmarks/gpu.py unpack --work /tmp/ackd packed/*       # on the other machine; prints a line for the shell
    python benchmarks/gpu.py run --work /tmp/ackd --out out --minutes 9 --parts 1,2,3,4
    python benchmarks/gpu.py show --out out

`run` reads out/gpu.json, goes on where it was, writes it after every measurement, and stops in time. README.md in this
folder explains the parts.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from rented import packing
from rented.goals import lines
from rented.record import Record, Task
from rented.speed_parts import ROOT, first_part, second_part
from rented.training_parts import keep_runs, part, restore_runs, tables

PARTS = (1, 2, 3, 4)


def tasks(options: argparse.Namespace, record: Record) -> Iterator[Task]:
    """Every task of the chosen parts in its order."""
    if 1 in options.parts:
        yield from first_part()
    if 2 in options.parts:
        yield from second_part(tiny=options.tiny)
    for table in tables(tiny=options.tiny, seeds=options.seeds, settings=options.settings):
        if table.part in options.parts:
            yield from part(table, options.work, record, options.workers)


def run(options: argparse.Namespace) -> int:
    """Measure until everything is done or the time is over; 0 when everything is done."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that runs write a checkpoint
    record = Record(options.out, minutes=options.minutes, previous=options.previous)
    restore_runs(options.work, (options.out, options.previous))
    to_do = record.run(tasks(options, record))
    names = [table.name for table in tables(tiny=options.tiny, seeds=options.seeds, settings=())]
    for line in keep_runs(options.work, options.out, names):
        print(line)
    show(record)
    print(f"{len(to_do)} left: {', '.join(to_do)}" if to_do else "everything is done")
    return 3 if to_do else 0


def show(record: Record) -> None:
    """Print what the record holds."""
    for line in lines(record.content):
        print(line)


def pack(options: argparse.Namespace) -> None:
    """Write the archives."""
    options.out.mkdir(parents=True, exist_ok=True)
    for line in packing.pack_code(ROOT, options.out, [each for each in options.packages.split(",") if each]):
        print(line)
    for given in options.data:
        name, _, source = given.partition("=")
        if not source or not Path(source).exists():
            sys.exit(f"--data is {given}; give a name and an existing path, as in cifar10=data/cifar10.tar.xz")
        for line in packing.pack_data(name, Path(source), options.out, limit=options.limit):
            print(line)


def _parts(text: str) -> tuple[int, ...]:
    found = tuple(int(each) for each in text.split(",") if each.strip().isdecimal())
    if not found or set(found) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{text} is not a list of parts, such as 1,2,3,4")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 3 when measurements are left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("run", help="measure", allow_abbrev=False)
    sub.add_argument("--out", type=Path, required=True, help="folder of gpu.json and of archives of runs")
    sub.add_argument("--previous", type=Path, default=None, help="--out of an earlier call, if --out is empty now")
    sub.add_argument("--work", type=Path, default=Path("/tmp/ackd-gpu"), help="folder of unpacked data and runs")
    sub.add_argument("--minutes", type=float, default=9.0, help="time that this call may take")
    sub.add_argument("--parts", type=_parts, default=PARTS, help="parts, separated by commas")
    sub.add_argument("--workers", type=int, default=6, help="runs of parts 3 and 4 at a time")
    sub.add_argument("--seeds", type=int, default=1, help="seeds of parts 3 and 4")
    sub.add_argument(
        "--settings", nargs=argparse.REMAINDER, default=["--fast"], help="the rest: settings of runs of parts 3 and 4"
    )
    sub.add_argument("--tiny", action="store_true", help="the same in miniature, to try the program on any machine")
    sub = commands.add_parser("show", help="print what was measured", allow_abbrev=False)
    sub.add_argument("--out", type=Path, required=True)
    sub = commands.add_parser("pack", help="pack what a bare machine lacks", allow_abbrev=False)
    sub.add_argument("--out", type=Path, required=True, help="folder for the archives")
    sub.add_argument("--data", action="append", default=[], metavar="NAME=PATH", help="images: a tree, or archives")
    sub.add_argument("--packages", default=",".join(packing.PACKAGES), help="distributions in pure Python")
    sub.add_argument("--limit", type=float, default=packing.LIMIT, help="largest size of an archive of images in MiB")
    sub = commands.add_parser("unpack", help="unpack on the other machine", allow_abbrev=False)
    sub.add_argument("--work", type=Path, default=Path("/tmp/ackd-gpu"))
    sub.add_argument("archives", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "run":
        return run(options)
    if options.command == "show":
        show(Record(options.out, minutes=0))
    elif options.command == "pack":
        pack(options)
    else:
        print("\n".join(packing.unpack(options.archives, options.work)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
