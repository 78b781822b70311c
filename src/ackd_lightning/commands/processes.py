"""Processes that run ``ackd``, for commands that train many networks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import torch

from ackd_lightning.errors import ACKDError

_PROGRESS = re.compile(r"^epoch \d+")
_EVERY = 15.0
"""Seconds between two progress lines of a run."""
_PATIENCE = 300.0
"""Seconds that a run has to stop: a step or a validation, and a checkpoint."""


def say(line: str) -> None:
    """Print a line of one of several threads in one piece; `print` writes its end apart, after that of another.

    Args:
        line: Text without its end.
    """
    print(f"{line}\n", end="", flush=True)


def devices_for(workers: int | None) -> list[str | None]:
    """Return one entry per concurrent run: a GPU, or None for the whole machine.

    Args:
        workers: Number of concurrent runs; None: one per GPU.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if workers is not None and workers < 1:
        raise ACKDError(f"--workers is {workers}; use 1 or more")
    if workers == 1 or (found < 2 and workers is None):
        return [None]
    if not found:
        return [None] * (workers or 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # numbers and names of GPUs as child processes read them
    names = visible.split(",") if visible else [str(number) for number in range(found)]
    return [names[number % found] for number in range(workers or found)]


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Say how to go on after Ctrl-C, SIGTERM or a closed terminal, which the command turns into an exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print("interrupted; the same command continues where it stopped", flush=True)
        raise


class Processes:
    """Starts processes, at most one per device at a time, and stops them.

    Args:
        devices: Values of CUDA_VISIBLE_DEVICES, one per concurrent process; [None]: one with all visible devices.
    """

    def __init__(self, devices: Sequence[str | None]) -> None:
        self.devices: SimpleQueue[str | None] = SimpleQueue()
        for device in devices:
            self.devices.put(device)
        self.workers = len(devices)
        self.children: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.stopping = False

    def process(self, arguments: list[str], log: Path, device: str | None, label: str) -> str | None:
        """Run ``ackd`` in a process of its own.

        Args:
            arguments: Command line after ``ackd``.
            log: File that its output is appended to.
            device: Value of CUDA_VISIBLE_DEVICES; None for that of this process.
            label: Text before its progress lines.

        Returns:
            Reason of a failure; None after a success.
        """
        environment = {key: value for key, value in os.environ.items() if key not in ("ACKD_RUN_NAME", "ACKD_RESUMED")}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        command = [sys.executable, "-m", "ackd_lightning", *arguments, "--trainer.enable_progress_bar", "false"]
        with log.open("a", encoding="utf-8") as stream:
            with self.lock:  # either stop sees this child, or no child is started
                if self.stopping:
                    return "interrupted"
                child = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the child once, through stop
                )
                self.children.add(child)
            assert child.stdout is not None
            with child.stdout:
                last = self.relay(child.stdout, stream, label)
            code = child.wait()
            with self.lock:
                self.children.discard(child)
        if code < 0:  # its last line is progress, not a reason
            return f"killed by {signal.Signals(-code).name}"
        return None if code == 0 else last or f"exit code {code}"

    def relay(self, source: IO[str], stream: IO[str], label: str) -> str:
        """Copy the output of a run to its log, print a progress line now and then, and return the last line.

        Args:
            source: Output of the run.
            stream: Log.
            label: Text before the progress lines.
        """
        shown, last = time.monotonic(), ""
        for line in source:
            stream.write(line)
            stream.flush()
            last = line.strip().removeprefix("ackd: ") or last
            if _PROGRESS.match(line) and time.monotonic() - shown > _EVERY:
                shown = time.monotonic()
                say(f"{label}: {line.strip()}")
        return last

    def stop(self) -> None:
        """Stop the child processes and wait for them."""
        with self.lock:
            self.stopping = True
            children = list(self.children)
        for child in children:
            child.terminate()  # a shell makes its background processes ignore SIGINT
        for child in children:
            try:
                child.wait(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)  # including the processes that it has started
