from __future__ import annotations

import hashlib
import tarfile
from dataclasses import replace

import pytest

from ackd_lightning.data import CINIC10DataModule
from ackd_lightning.errors import ACKDError


@pytest.fixture
def cinic(tmp_path, write_classes):
    root = tmp_path / "set"
    for number, part in enumerate(("train", "valid", "test")):
        write_classes(root / part, {"bird": 10, "ship": 10, "truck": 10}, seed=number * 10_000)
    return root


def count(loader):
    return sum(len(batch.target) for batch in loader)


def test_the_valid_folder_is_validation(cinic):
    module = CINIC10DataModule(cinic, batch_size=8, download=False)
    assert module.num_classes == 3
    assert module.num_train_samples == 0
    module.setup()
    assert module.num_train_samples == 30
    assert count(module.val_dataloader()) == 30
    val, test = next(iter(module.val_dataloader())), next(iter(module.test_dataloader()))
    assert not (val.image == test.image).all()


def test_a_share_of_the_valid_folder(cinic):
    module = CINIC10DataModule(cinic, batch_size=8, val_fraction=0.3)
    module.setup()
    assert module.num_train_samples == 30
    assert count(module.val_dataloader()) == 9


def test_protocol_of_the_paper_does_not_read_valid(cinic):
    (cinic / "valid" / "bird" / "0000.png").write_bytes(b"broken")
    module = CINIC10DataModule(cinic, batch_size=8, val_fraction=0)
    module.prepare_data()
    assert module.val_is_test
    val, test = next(iter(module.val_dataloader())), next(iter(module.test_dataloader()))
    assert (val.image == test.image).all()
    with pytest.raises(ACKDError, match=r"valid/bird/0000\.png"):
        CINIC10DataModule(cinic, batch_size=8).prepare_data()


def test_download_and_unpack(cinic, tmp_path, monkeypatch):
    path = tmp_path / "mirror.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for part in ("train", "valid", "test"):
            tar.add(cinic / part, part)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setattr(CINIC10DataModule, "archive", replace(CINIC10DataModule.archive, md5=md5))
    module = CINIC10DataModule(tmp_path / "data", batch_size=8, url=path.as_uri())
    assert module.num_classes == 10  # nothing exists yet
    module.prepare_data()
    assert module.num_classes == 3
    assert CINIC10DataModule(tmp_path / "data").num_classes == 3
    assert (tmp_path / "data" / "cinic-10" / "train" / "bird" / "0000.png").exists()


@pytest.mark.parametrize(
    ("part", "sentence"),
    [("valid", "there is no folder .*valid: CINIC-10 has the folders"), ("train", "CINIC-10 is not in")],
)
def test_a_missing_part(cinic, part, sentence):
    (cinic / part).rename(cinic / "elsewhere")
    with pytest.raises(ACKDError, match=sentence):
        CINIC10DataModule(cinic, download=False).prepare_data()


def test_a_share_above_one(cinic):
    with pytest.raises(ACKDError, match=r"val_fraction is 1\.5"):
        CINIC10DataModule(cinic, val_fraction=1.5)
