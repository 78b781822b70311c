"""Exceptions of the package, and the hint for a name that was not found."""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Iterable


class ACKDError(ValueError):
    """Wrong input from the user: one sentence with the value, the place and the remedy.

    The command line prints the sentence alone and exits with code 2; with ``ACKD_DEBUG=1`` it prints a traceback.
    """


class NonFiniteError(RuntimeError):
    """The loss or the weights of a run are non-finite; the last finite checkpoint is kept."""


class NotWrittenError(RuntimeError):
    """A file could not be written, as on a full disk; the sentence names what is left."""


class RunsFailedError(RuntimeError):
    """Some runs of a table failed; the others were continued, and the table has been written."""


class UnreadableImagesError(RuntimeError):
    """Some images could not be read and were skipped; the predictions for the others have been written."""


class NotReadyError(RuntimeError):
    """This machine cannot train as it is; the sentence has the remedy."""


class RunFinishedError(ACKDError):
    """The run that was to be resumed has already finished, which is not a failure."""


class RunStoppedError(SystemExit):
    """A signal ended a fit at a safe place: everything up to there is in the run's last checkpoint.

    Attributes:
        code: Exit code 128 plus the number of the signal, as shells use it: 130 for Ctrl-C, 143 for SIGTERM.
        sentence: What was kept, and how to resume.
    """

    def __init__(self, signal_number: int, sentence: str) -> None:
        super().__init__(128 + signal_number)
        self.sentence = f"{signal.Signals(signal_number).name} {sentence}"


NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of files that this user may not read or write, and of file systems that nobody may write."""


def not_permitted(error: OSError) -> str:
    """Return a sentence about a file that this user may not read or write.

    Args:
        error: What the system answered.
    """
    place = str(error) if error.filename is None else f"{error.filename} may not be read or written"
    return f"{place} ({error.strerror}): change its permissions or choose another place"


def first_line(error: BaseException, most: int = 160) -> str:
    r"""Return the first line of an error, or the name of its type if it has no text.

    Args:
        error: Any exception.
        most: Largest number of characters.

    Examples:
        >>> first_line(ValueError("no such size\nat line 3")), first_line(OSError())
        ('no such size', 'OSError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:most]


def count_of(number: int, noun: str) -> str:
    """Return a number with a noun in the right form.

    Args:
        number: How many.
        noun: Noun in the singular, whose plural ends in s.

    Examples:
        >>> count_of(1, "epoch"), count_of(1200, "epoch")
        ('1 epoch', '1,200 epochs')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def first_names(names: Iterable[object], most: int = 3) -> str:
    """Return the first names of a list, and the number of the others.

    Args:
        names: Names.
        most: Largest number of names that are written.

    Examples:
        >>> first_names(["cat", "dog"]), first_names("abcde")
        ('cat, dog', 'a, b, c and 2 more')
    """
    listed = list(map(str, names))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most:,} more" if len(listed) > most else "")


def near_matches(value: str, known: Iterable[str], *, most: int = 3, otherwise: str | None = None) -> str:
    """Return a hint such as ``did you mean 'resnet20'?``, or another hint if no name is similar.

    Args:
        value: Name that was not found.
        known: Valid names.
        most: Largest number of similar names in the hint.
        otherwise: Hint if no name is similar. None for the known names.

    Examples:
        >>> near_matches("resnet2O", ["resnet20", "wrn_40_2"])
        "did you mean 'resnet20'?"
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(value, names, n=most, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    if otherwise is not None:
        return otherwise
    return f"known are {', '.join(names)}" if len(names) <= 12 else f"known are {', '.join(names[:12])}, …"
