from __future__ import annotations

import shutil

import pytest
import torch

from ackd_lightning.data import ImageNetDataModule
from ackd_lightning.errors import ACKDError


@pytest.fixture
def imagenet(tmp_path, write_classes):
    write_classes(tmp_path / "set" / "train", {"n01": 4, "n02": 4, "n03": 4}, size=(90, 70), suffix=".JPEG")
    write_classes(tmp_path / "set" / "val", {"n01": 1, "n02": 1, "n03": 1}, size=(70, 90), suffix=".JPEG")
    return tmp_path / "set"


def test_layout_and_shapes(imagenet):
    module = ImageNetDataModule(imagenet, batch_size=4, val_fraction=0.25)
    assert module.num_classes == 3
    module.prepare_data()
    module.setup("fit")
    assert module.num_train_samples == 9
    batch = next(iter(module.train_dataloader()))
    assert batch.image.shape == (4, 3, 224, 224)
    assert batch.image.dtype == torch.uint8
    assert torch.cat([b.target for b in module.test_dataloader()]).tolist() == [0, 1, 2]
    assert torch.cat([b.target for b in module.val_dataloader()]).tolist() == [0, 1, 2]
    assert module.on_after_batch_transfer(batch, 0).image.dtype == torch.float32


def test_number_of_classes_before_the_data_exist(tmp_path):
    assert ImageNetDataModule(tmp_path).num_classes == 1000


def flat_val(root):
    for path in list((root / "val").rglob("*.JPEG")):
        path.rename(root / "val" / f"{path.parent.name}_{path.name}")
    for entry in list((root / "val").iterdir()):
        if entry.is_dir():
            entry.rmdir()
    return r"val holds 3 images in one flat folder.*sort them into .*val/<wnid>/"


def no_train(root):
    (root / "train").rename(root / "trian")
    return r"there is no folder .*train: lay ImageNet out as train/<wnid>"


def missing_class(root):
    shutil.rmtree(root / "train" / "n02")
    return r"classes that the training part lacks \(n02\)"


def truncated(root):
    path = root / "train" / "n03" / "0002.JPEG"
    path.write_bytes(path.read_bytes()[:-100])
    return r"could not read the image .*n03/0002\.JPEG"


@pytest.mark.parametrize("harm", [flat_val, no_train, missing_class, truncated])
def test_bad_data(imagenet, harm):
    sentence = harm(imagenet)
    with pytest.raises(ACKDError, match=sentence) as caught:
        ImageNetDataModule(imagenet).prepare_data()
    assert "\n" not in str(caught.value)
