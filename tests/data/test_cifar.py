from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from ackd_lightning.data import CIFAR100DataModule
from ackd_lightning.data.cifar import read_arrays
from ackd_lightning.data.download import extract
from ackd_lightning.errors import ACKDError

NAMES = [f"class{i:02d}" for i in range(100)]


def official(count, seed):
    data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"data": data, "fine_labels": [i % 100 for i in range(count)], "coarse_labels": [0] * count}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive in the official format, in the place of the official one."""
    members = {
        "train": pickle.dumps(official(400, 1), protocol=3),
        "test": pickle.dumps(official(100, 2), protocol=3),
        "meta": pickle.dumps({"fine_label_names": NAMES}, protocol=3),
    }
    path = tmp_path / "mirror" / "cifar-100-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100DataModule, "archive", replace(CIFAR100DataModule.archive, md5=md5))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    monkeypatch.setattr(CIFAR100DataModule, "member_md5", sums)
    return path


def check(module):
    test = torch.cat([batch.image for batch in module.test_dataloader()])
    assert test.numpy().reshape(100, 3072).tolist() == official(100, 2)["data"].tolist()
    assert torch.cat([batch.target for batch in module.test_dataloader()]).tolist() == list(range(100))
    assert module.class_names == tuple(NAMES)
    assert module.num_train_samples == 300


def test_download_and_read(archive, tmp_path):
    root = tmp_path / "data"
    module = CIFAR100DataModule(root, url=archive.as_uri(), val_fraction=0.25)
    assert module.num_classes == 100
    module.prepare_data()
    check(module)
    assert (root / "cifar-100-python.tar.gz").exists()
    check(CIFAR100DataModule(root, download=False, val_fraction=0.25))


@pytest.mark.parametrize("inner", [True, False], ids=["root", "folder"])
def test_unpacked_folder(archive, tmp_path, inner):
    extract(archive, tmp_path / "cifar-100-python")
    root = tmp_path / "cifar-100-python" if inner else tmp_path
    check(CIFAR100DataModule(root, download=False, val_fraction=0.25))


def test_a_changed_member_is_refused(archive, tmp_path):
    extract(archive, tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"half")
    with pytest.raises(ACKDError, match=r"cifar-100-python/test is not the official file \(4 bytes"):
        CIFAR100DataModule(tmp_path).prepare_data()


def test_missing_archive(tmp_path):
    with pytest.raises(ACKDError, match=r"CIFAR-100 is not in .*set download: true"):
        CIFAR100DataModule(tmp_path, download=False).prepare_data()


def test_half_an_archive(archive, tmp_path):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(ACKDError, match=r"is not the official file of CIFAR-100 \(1,000 of 169,001,437 bytes"):
        CIFAR100DataModule(tmp_path).prepare_data()


def test_failed_download_names_the_place(archive, tmp_path):
    with pytest.raises(ACKDError, match=f"put the file at {tmp_path}/x/cifar-100-python.tar.gz"):
        CIFAR100DataModule(tmp_path / "x", url=(tmp_path / "nothing").as_uri()).prepare_data()


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize(
    "content", [{"data": Bomb()}, {"data": np.array([Bomb()], dtype=object)}, {"data": torch.Size}]
)
def test_a_pickle_that_calls_anything_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ACKDError, match="has no place in a CIFAR file"):
        read_arrays(pickle.dumps(content, protocol=2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", [2, 3])
def test_arrays_are_read_in_old_protocols(protocol):
    content = official(3, 0)
    read = read_arrays(pickle.dumps(content, protocol=protocol))
    assert np.array_equal(read["data"], content["data"])
    assert read["fine_labels"] == content["fine_labels"]


def test_a_cut_off_pickle():
    with pytest.raises(ACKDError, match="cannot be read safely"):
        read_arrays(pickle.dumps(official(3, 0), protocol=2)[:200])
