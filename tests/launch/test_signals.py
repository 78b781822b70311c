"""Commands that a signal ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ackd_lightning.cli import main
from ackd_lightning.launch.signals import ended_by_signals

COMMAND = """
import signal, sys, tempfile, time
from pathlib import Path
from ackd_lightning import cli
from ackd_lightning.writing import whole_file

def command(*positional, **options):
    with tempfile.TemporaryDirectory(dir=".") as folder, whole_file(Path("student.safetensors")) as partial:
        partial.touch()
        print("begun", flush=True)
        time.sleep(60)

def imported(name):
    if when == "importing":
        print("begun", flush=True)
        time.sleep(60)
    return command

cli.pkgutil.resolve_name = imported
number, before, when = sys.argv[1:]
signal.signal(getattr(signal, number), getattr(signal, before))
sys.argv[1:] = ["doctor"]
cli.script()
"""


def started(name: str, before: str, folder: Path, *, when: str = "running") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, name, before, when], cwd=folder, stdout=-1, stderr=-1, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    assert len(list(folder.iterdir())) == (2 if when == "running" else 0)
    return process


@pytest.mark.parametrize(("name", "code", "said"), [("SIGTERM", 143, "ackd: terminated\n"), ("SIGHUP", 129, "")])
def test_a_command_that_a_signal_ends_leaves_no_hidden_files(tmp_path, name, code, said):
    process = started(name, "SIG_DFL", tmp_path)
    process.send_signal(getattr(signal, name))
    assert process.communicate(timeout=60) == ("", said)
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_modules_are_imported_ends_the_process_at_once(tmp_path):
    process = started("SIGTERM", "SIG_DFL", tmp_path, when="importing")
    process.terminate()
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGTERM


def test_a_command_goes_on_when_its_terminal_closes_after_nohup(tmp_path):
    process = started("SIGHUP", "SIG_IGN", tmp_path)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_handlers_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with ended_by_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_runs_in_another_thread_too():
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(main(["configs", "digits_resnet8"])))
    thread.start()
    thread.join()
    assert results == [0]


def test_a_second_signal_ends_a_process_that_is_busy_with_the_first():
    with pytest.raises(SystemExit) as caught, ended_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    with ended_by_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        except SystemExit:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
