"""Completion: what a word may become, without torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ackd_lightning.cli import main, make_parser
from ackd_lightning.commands.completion import candidates
from ackd_lightning.launch import LIGHTNING


@pytest.fixture
def runs(tmp_path, monkeypatch):
    for name in ("runs/pets/a", "runs/pets+kd/b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)


def of(line: str) -> list[str]:
    return candidates(make_parser(), line.split(" "))


def test_subcommands():
    assert of("te") == ["test"]
    assert {*LIGHTNING, "init", "--help"} <= set(of(""))
    assert of("nothing ") == []


def test_configurations_packaged_and_in_the_folder(runs):
    assert of("fit --config digits_resnet20.") == ["digits_resnet20.yaml"]
    assert of("fit --config mi") == ["mine.yaml"]
    assert "kd.yaml" in of("fit --config digits_resnet20.yaml --config k")
    assert "recipes/strong.yaml" in of("fit -c recipes/s")


@pytest.mark.parametrize("command", ["test", "report", "export", "compare", "inspect", "predict", "fit --resume"])
def test_runs(runs, command):
    assert of(f"{command} runs/pe") == ["runs/pets+kd/b", "runs/pets/a"]
    assert command not in ("test", "predict") or of(f"{command} runs/pets/a ") == []


def test_options_and_their_values(runs):
    assert of("test runs/pets/a --which ") == ["best", "last"]
    assert of("fit --data.samp") == ["--data.sampling"]
    assert of("fit --data.sampling ") == ["balanced", "shuffle"]
    assert of("export runs/pets/a --out ") == []  # a file, which the shell completes
    assert "table2" in of("reproduce ta")


def test_nothing_heavy_is_imported():
    code = "import sys\nfrom ackd_lightning.cli import main\nmain(['completion', '--words', 'test', ''])\n"
    code += "print([name for name in ('torch', 'lightning', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_script_of_bash_completes_a_command_line(runs, capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    program = Path("ackd")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ackd_lightning "$@"\n')
    program.chmod(0o755)
    line = f'{script}COMP_WORDS=(./ackd report ""); COMP_CWORD=2; _ackd; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["runs/pets+kd/b", "runs/pets/a"]
