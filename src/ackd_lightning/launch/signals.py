"""Signals that end the command: what it has begun is cleaned up before the process ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_ENDING = [number for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number is not None]


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and when the terminal closes, so that no hidden file or child process is left.

    A signal that is ignored, as SIGHUP is after ``nohup``, stays so. A second one ends the process at once. Outside of
    the main thread nothing changes, as Python handles signals there alone.
    """
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.getsignal(number) for number in (_ENDING if main else ())}
    changed = {number: each for number, each in previous.items() if each not in (signal.SIG_IGN, None)}
    for number in changed:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)
