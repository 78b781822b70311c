"""The one exception that a user is meant to read."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class ACKDError(ValueError):
    """A mistake in the input: one sentence that names the value, the place and the remedy.

    The command line prints the sentence alone and exits with code 2; a traceback is shown with ``ACKD_DEBUG=1``.
    """


class NonFiniteError(RuntimeError):
    """The loss or the weights of a run are no longer finite numbers; the last finite checkpoint is kept."""


class RunsFailedError(RuntimeError):
    """Some runs of a table failed; the others went on, and the table is written all the same."""


class RunFinishedError(ACKDError):
    """The run that was to go on has ended already: nothing to do, and no failure."""


class RunStoppedError(SystemExit):
    """A signal ended a fit at a safe place: everything up to there is in the run's last checkpoint.

    Attributes:
        code: 128 and the number of the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM.
        sentence: what was kept, and how to go on.
    """

    def __init__(self, signal_number: int, sentence: str) -> None:
        super().__init__(128 + signal_number)
        self.sentence = f"{signal.Signals(signal_number).name} {sentence}"


def near_matches(value: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return a hint such as ``did you mean 'resnet20'?``, or the known names when nothing is near.

    Args:
        value: the name that was not found.
        known: the valid names.
        most: how many near names to show.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(value, names, n=most, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"known are {', '.join(names)}" if len(names) <= 12 else f"known are {', '.join(names[:12])}, …"
