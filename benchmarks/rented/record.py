"""The record of what was measured on a rented GPU, and the tasks that fill it. Standard library only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "gpu.json"
MARGIN = 1.3
"""Factor on the longest time so far of tasks of the same kind."""
LAST = 15.0
"""Seconds that are kept for the end of the program."""


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
        part: Number of the part.
        name: Key of its result in the record.
        kind: Tasks of the same kind take about as long.
        seconds: Estimate where no task of the kind has run yet.
        run: Function of the seconds that are left; returns plain data. ``{"finished": False}`` in it stands for a task
            that goes on in the next call.
    """

    part: int
    name: str
    kind: str
    seconds: float
    run: Callable[[float], dict[str, Any]] = field(compare=False)


class Record:
    """Results by the name of their task, in a JSON file that is whole at any time.

    Args:
        out: Folder of the file; an earlier file in it is continued.
        previous: Folder with the file of an earlier call, for a machine that forgets everything.
        minutes: Time that this call may take.
        clock: Function that returns seconds.
    """

    def __init__(
        self, out: Path, *, minutes: float, previous: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self._clock = out / NAME, clock
        self._end = clock() + 60 * minutes - LAST
        out.mkdir(parents=True, exist_ok=True)
        source = next((each / NAME for each in (out, previous) if each and (each / NAME).is_file()), None)
        self.content: dict[str, Any] = {"results": {}, "seconds": {}, "failed": {}}
        if source is not None:
            self.content = json.loads(source.read_text(encoding="utf-8"))

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._end - self._clock()

    def is_done(self, name: str) -> bool:
        """Return whether a task has a result that is finished."""
        return bool(self.content["results"].get(name, {"finished": False}).get("finished", True))

    def estimate(self, task: Task) -> float:
        """Return the seconds that a task is expected to take."""
        return MARGIN * max(self.content["seconds"].get(task.kind, [])) if self.known(task) else task.seconds

    def known(self, task: Task) -> bool:
        """Return whether a task of this kind has run."""
        return bool(self.content["seconds"].get(task.kind))

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Write a result."""
        self.content["results"][name] = result
        self.save()

    def save(self) -> None:
        """Write the file whole or not at all."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        partial.replace(self.path)

    def run(self, tasks: Iterable[Task]) -> list[str]:
        """Run the tasks that are not done and fit into the time; a failure does not stop the others.

        Returns:
            Names of the tasks that are still to do.
        """
        to_do = []
        for task in tasks:
            if self.is_done(task.name):
                continue
            estimate, left = self.estimate(task), self.left()
            if estimate > left:
                print(f"{task.name}: left for the next call, about {estimate:.0f} s and {left:.0f} s left", flush=True)
                to_do.append(task.name)
                continue
            print(f"{task.name}: starts, about {estimate:.0f} s of {left:.0f} s", flush=True)
            begin = self._clock()
            try:
                result = task.run(left)
            except Exception as error:  # whatever it is, the other measurements count
                self.content["failed"][task.name] = f"{type(error).__name__}: {error}"[-2000:]
                print(f"{task.name}: FAILED: {self.content['failed'][task.name]}", flush=True)
                to_do.append(task.name)
                self.save()
                continue
            seconds = self._clock() - begin
            self.content["failed"].pop(task.name, None)
            if result.get("finished", True):
                self.content["seconds"].setdefault(task.kind, []).append(seconds)
            else:
                to_do.append(task.name)
            self.keep(task.name, {**result, "seconds": seconds})
        return to_do
