"""Output of the command, whoever reads it and however the process ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from ackd_lightning.launch.streams import _Unbroken

CODE = """
import os
from ackd_lightning.launch.streams import outlive_readers
outlive_readers()
print("a", end="")
os._exit(3)  # as a process that is killed, or a watchdog
"""


def test_unbuffered_output_is_not_held_back():
    surroundings = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=False, env=surroundings)
    assert (done.returncode, done.stdout) == (3, b"a")


LOG = """
import logging
from ackd_lightning.launch.streams import print_log
print_log()
logging.basicConfig()  # as some libraries do
logging.getLogger("ackd_lightning.data").warning("a line")
"""


def test_lines_of_the_log_are_plain_whatever_libraries_do():
    done = subprocess.run([sys.executable, "-c", LOG], capture_output=True, check=True)
    assert done.stderr == b"a line\n"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_takes_no_more_is_not_taken_for_a_closed_terminal(number, tmp_path):
    with (tmp_path / "log.txt").open("w") as file, pytest.raises(OSError, match="the disk"):
        _Unbroken(file)._leave(OSError(number, "the disk"))
