"""A process that claims the same run folders as others again and again; started several times by test_claim.py.

Exits with 1 if another process was in a claimed folder, or removed one that this process held.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

from ackd_lightning.errors import ACKDError
from ackd_lightning.runs.claim import claim


def enter_and_leave(parent: Path, name: str, chance: random.Random) -> bool:
    """Claim a folder and leave it in a random way; return whether it was given to this process."""
    try:
        mine = claim(parent, name)
    except ACKDError as error:
        if "trained by another process" in str(error):
            return False
        raise
    owner = mine.folder / "owner"
    with owner.open("x"):  # fails if another process is in the folder
        pass
    for _ in range(chance.randrange(3)):
        time.sleep(0)
        assert owner.exists(), "the folder of a claim was removed"
        assert mine.held
    way = chance.choice(["discard", "release", "interrupted"])
    if way != "discard":
        owner.unlink()  # empty, so that it is removed if this process made it
    if way == "interrupted":  # the run failed before it wrote anything
        with mine:
            pass
    elif way == "discard" and not mine.made:
        owner.unlink()
        mine.discard()
    else:
        getattr(mine, way)()
    return True


def own_folder(parent: Path) -> str:
    """Claim a folder that is named after the time, and leave a result in it."""
    with claim(parent) as mine:
        (mine.folder / "summary.json").open("x").close()
    return mine.folder.name


def main(parent: Path, rounds: int, mode: str) -> None:
    chance = random.Random(os.getpid())
    if mode == "named":
        # a new name every 5 ms, the same in all processes: folders are mostly made and removed, not only entered
        print(sum(enter_and_leave(parent, f"run{time.monotonic_ns() // 5_000_000}", chance) for _ in range(rounds)))
    else:
        time.strftime = lambda *_: "20250131-235959"  # type: ignore[assignment]  # everybody in the same second
        print(*(own_folder(parent) for _ in range(rounds)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
