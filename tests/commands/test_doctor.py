"""`ackd doctor`: exit code, remedies, and what a missing or old library looks like."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch.accelerators import CPUAccelerator

from ackd_lightning.cli import main
from ackd_lightning.commands import doctor

METADATA = """Metadata-Version: 2.1
Name: ackd-lightning
Version: 0.1.0
Requires-Dist: torch>=2.0
Requires-Dist: rich>=999
Requires-Dist: nothing-of-this-name>=1; python_version < "3"
Provides-Extra: tables
Requires-Dist: pyyaml>=1; extra == "tables"
Provides-Extra: absent
Requires-Dist: nothing-of-this-name>=1; extra == "absent"
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A description of this package as pip would leave it, which is found before the real one."""
    folder = tmp_path / "site" / "ackd_lightning-0.1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.chdir(tmp_path)


def test_a_machine_that_trains_exits_with_0_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CPUAccelerator, "auto_device_count", lambda *_: 2)  # two processes would print it twice
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert "works" in found["training"]["one step"]
    assert {"CPU", "bfloat16"} <= found["devices"].keys()
    assert list(tmp_path.iterdir()) == []


def test_old_libraries_and_extras_are_named_with_the_command(installed, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_one_step", lambda problems: "works")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "pip install 'rich>=999'" in shown.err
    assert "nothing-of-this-name" not in shown.err
    assert "ackd-lightning[absent]" in shown.out
    assert "ackd-lightning[tables]" not in shown.out


def test_a_step_that_fails_is_a_problem(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no kernel image is available")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ackd_lightning.launch.execute.run", fails)
    assert main(["doctor"]) == 1
    assert "no kernel image" in capsys.readouterr().err


def test_a_gpu_that_does_not_answer_is_a_problem_with_a_remedy(monkeypatch, capsys):
    def busy(number):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nsecond line")

    monkeypatch.setattr(doctor, "_one_step", lambda problems: "works")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_properties", busy)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "GPU 0 cannot be used (CUDA error: all CUDA-capable devices are busy)" in shown.err
    assert "CUDA_VISIBLE_DEVICES" in shown.err
    assert "second line" not in shown.err + shown.out
