"""Memory does not grow with the epochs: resident memory of runs of many short ones on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import lightning.pytorch as L
import torch
from training.helpers import Blobs, module, trainer


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4.096  # kB


class Watch(L.Callback):
    def __init__(self, leak):
        self.leak, self.seen, self.kept = leak, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.leak and batch_idx == 0:  # one batch an epoch
            self.kept.append(batch[0].clone())

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(resident())


class Large(Blobs):
    # one batch of 128 images is 98 kB
    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, batch_size=128)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.val, batch_size=128)


torch.set_num_threads(1)
for name, epochs, start in (("plain", 160, 60), ("leak", 80, 20)):
    data, watch = Large(), Watch(name == "leak")
    data.train, data.val = data._data(0, 128), data._data(1, 128)
    trainer(max_epochs=epochs, callbacks=[watch], check_val_every_n_epoch=10).fit(module(), datamodule=data)
    seen = torch.tensor(watch.seen[start:], dtype=torch.float64)
    epoch = torch.arange(len(seen), dtype=torch.float64)
    slope = float(((epoch - epoch.mean()) * (seen - seen.mean())).sum() / (epoch - epoch.mean()).square().sum())
    print(f"{name} {slope:.2f} kB an epoch", flush=True)
"""

ONE_BATCH = 128 * 3 * 8 * 8 * 4 / 1000  # kB

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")


@pytest.fixture(scope="module")
def slopes(tmp_path_factory):
    """Return the growth of memory in kB an epoch, by name of the run."""
    script = tmp_path_factory.mktemp("memory") / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(Path(__file__).parents[1])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line.endswith("kB an epoch")]
    return {words[0]: float(words[1]) for words in lines}


def test_memory_does_not_grow(slopes):
    assert slopes["plain"] < ONE_BATCH / 2


def test_a_leak_of_one_batch_an_epoch_is_found(slopes):
    assert slopes["leak"] > ONE_BATCH / 2
