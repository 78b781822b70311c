"""The wheel: complete, small, and usable where nothing of the repository is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ackd_lightning import __version__
from ackd_lightning.config.files import config_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_has_code_and_configurations_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    parts = {name.split("/")[0] for name in names}
    assert parts == {"ackd_lightning", f"ackd_lightning-{__version__}.dist-info"}
    packaged = {name.removeprefix("ackd_lightning/configs/") for name in names if "/configs/" in name}
    assert packaged == {str(path.relative_to(config_folder())) for path in config_folder().rglob("*.yaml")}
    assert {"ackd_lightning/py.typed", f"ackd_lightning-{__version__}.dist-info/licenses/LICENSE"} <= set(names)
    assert {Path(name).suffix for name in names if name.startswith("ackd_lightning/")} == {".py", ".yaml", ".typed"}
    assert wheel.stat().st_size < 1_000_000


def test_the_wheel_trains_without_the_repository(wheel, tmp_path):
    """In an environment that has the wheel and, from this one, its dependencies."""
    environment = tmp_path / "env"
    venv.create(environment)
    base = {"base": str(environment), "platbase": str(environment)}
    site, scripts = (Path(sysconfig.get_path(name, vars=base)) for name in ("purelib", "scripts"))
    python = scripts / "python"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # a plain path in a .pth file is put after the environment's own packages, and runs no other .pth
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = "import ackd_lightning as a; print(a.__file__, a.__version__)"
    found = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True, env=clean, cwd=tmp_path)
    assert found.stdout.split() == [str(site / "ackd_lightning/__init__.py"), __version__]
    fit = ["-m", "ackd_lightning", "fit", "--config", "digits_resnet8.yaml", "--trainer.max_epochs", "1"]
    small = ["--data.train_fraction", "0.1", "--name", "wheel"]
    subprocess.run([python, *fit, *small], check=True, capture_output=True, env=clean, cwd=tmp_path)
    assert (tmp_path / "runs/digits_resnet8/wheel/student.safetensors").is_file()


def test_the_citation_names_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
