"""The files that ``make new-method`` writes pass their own tests and the checks."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from new_method import ROOT, write


def test_written_files_run(tmp_path):
    for part in ("src", "configs", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "golden", "results"))
    written = write("nearly_kd", root=tmp_path)
    source = str(tmp_path / "src")
    code = f"import sys; sys.path.insert(0, {source!r}); import pytest; raise SystemExit(pytest.main(sys.argv[1:]))"
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path / "tests/methods/test_nearly_kd.py"),
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
    with pytest.raises(SystemExit, match="exists"):
        write("nearly_kd", root=tmp_path)
    assert "NearlyKd" in written[-1].read_text(encoding="utf-8")


def test_a_name_that_is_not_a_module_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="My-Method"):
        write("My-Method", root=tmp_path)
