"""Output of the command that outlives its readers."""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import sys


class _Unbroken(io.TextIOWrapper):
    """Output that goes nowhere once its reader has left, so that a training goes on.

    The reader is a process, as in ``ackd fit | head``, or a terminal that was closed.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        stream.flush()
        errors = "backslashreplace" if stream.errors == "strict" else stream.errors  # names of files need not be text
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors=errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,  # python -u and PYTHONUNBUFFERED: nothing is lost when a process dies
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        closed_terminal = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        if error.errno != errno.EPIPE and not closed_terminal:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def outlive_readers() -> None:
    """Let the output of this process go nowhere, instead of ending the process, once its reader has left."""
    for name in ("stdout", "stderr"):
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper) and not stream.closed:
            setattr(sys, name, _Unbroken(stream))


def print_log() -> None:
    """Print what this package logs as plain lines on stderr, whatever handlers other libraries install."""
    log = logging.getLogger("ackd_lightning")
    if logging.lastResort is not None:  # which finds the stderr of the moment, also below a progress bar
        log.addHandler(logging.lastResort)
    log.propagate = False
