"""Output of the command, whoever reads it and however the process ends."""

from __future__ import annotations

import os
import subprocess
import sys

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
