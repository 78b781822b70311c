"""A fit that is stopped by a signal and goes on ends with the weights of an uninterrupted one, bit for bit."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ackd_lightning.callbacks.checkpoints import WholeCheckpoints
from training.helpers import largest_difference
from training.resume_script import Signal, fit

STEPS = 15
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # it goes on there
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes"),  # on one core
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted fits by method."""
    known = {}

    def result(method):
        if method not in known:
            known[method] = fit(tmp_path_factory.mktemp(method), method)
        return known[method]

    return result


def assert_same_end(again, whole):
    assert largest_difference(again["state"], whole["state"]) == 0.0
    assert again["steps"] == whole["steps"] == STEPS
    for key in ("best", "early", "lr"):
        assert again[key] == whole[key], key


@pytest.mark.parametrize(
    ("method", "step", "number", "workers"),
    [
        ("ackd", 2, signal.SIGTERM, 0),  # inside the first epoch
        ("ackd", 7, signal.SIGINT, 0),
        ("ackd", 7, signal.SIGUSR1, 2),
        ("ackd", 9, signal.SIGTERM, 0),  # last step of an epoch: the epoch is ended first
        ("crd", 8, signal.SIGTERM, 0),
        ("one", 6, signal.SIGTERM, 2),
        ("atsc", 7, signal.SIGTERM, 0),
        ("aikd", 11, signal.SIGTERM, 0),  # in the third epoch: the snapshot is that of the second
        ("aikd_table", 7, signal.SIGTERM, 0),
        ("acn", 7, signal.SIGTERM, 0),
    ],
)
def test_a_stopped_fit_goes_on_as_if_nothing_had_been(tmp_path, whole, method, step, number, workers):
    stopped = fit(tmp_path, method, stop=Signal(step, number), workers=workers)
    assert stopped["code"] == 128 + number
    assert stopped["steps"] == step + 1
    again = fit(tmp_path, method, resume=tmp_path / "checkpoints" / "last.ckpt", workers=workers)
    assert again["code"] == 0
    assert_same_end(again, whole(method))


def test_a_signal_during_validation_waits_for_its_end(tmp_path, whole):
    stopped = fit(tmp_path, "ackd", stop=Signal(5, signal.SIGTERM, validating=True))
    assert (stopped["code"], stopped["steps"]) == (143, 5)
    again = fit(tmp_path, "ackd", resume=tmp_path / "checkpoints" / "last.ckpt")
    assert_same_end(again, whole("ackd"))


def test_a_run_goes_on_from_the_end_of_an_epoch(tmp_path, whole):
    fit(tmp_path, "ackd", max_epochs=2)
    assert_same_end(fit(tmp_path, "ackd", resume=tmp_path / "checkpoints" / "last.ckpt"), whole("ackd"))


def test_signal_handlers_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    fit(tmp_path, "ackd", stop=Signal(1, signal.SIGTERM))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")
def test_two_processes_stop_together_and_go_on(tmp_path):
    """Only one of them gets the signal."""
    script = Path(__file__).parents[1] / "training" / "resume_script.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), "7"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert (result["stopped"]["code"], result["stopped"]["steps"]) == (143, 8)
    assert_same_end(result["again"], result["whole"])


# ---------------------------------------------------------------- writing


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path):
    """A limit on the size of files stands in for the full disk."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"number": torch.arange(3)}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(
            OSError, match=r"could not be written \(.*\) and the one before it is still there"
        ) as caught:
            WholeCheckpoints().save_checkpoint({"number": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]


def test_a_writer_that_is_killed_leaves_the_checkpoint_before_it(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"number": torch.arange(3)}, path)
    code = (
        "import os, signal, sys, torch\n"
        "from ackd_lightning.callbacks.stopping import WholeCheckpoints\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "WholeCheckpoints().save_checkpoint({'number': torch.zeros(1000)}, sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["number"].tolist() == [0, 1, 2]
