from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ackd_lightning.data.datasets import FileImages, TensorImages
from ackd_lightning.data.decoding import read_image
from ackd_lightning.data.folders import scan_class_folders
from ackd_lightning.data.pixels import ImageFormat
from ackd_lightning.data.sampling import STREAM_TRANSFORM
from ackd_lightning.data.transforms import random_crop
from ackd_lightning.random import mix


def test_tensor_images_gather_rows_and_keep_positions():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 2, 2)
    dataset = TensorImages(images, torch.arange(10) % 3, torch.tensor([9, 4, 7]))
    assert len(dataset) == 3
    batch = dataset.__getitems__([(5, 2), (5, 0)])
    assert batch.image[:, 0, 0, 0].tolist() == [7, 9]
    assert batch.target.tolist() == [1, 0]
    assert batch.index.tolist() == [2, 0]
    assert batch.epoch.tolist() == [5, 5]
    assert dataset.__getitems__([1]).epoch.tolist() == [-1]
    assert dataset[(5, 1)].image[0, 0, 0, 0].item() == 4


@pytest.fixture
def file_images(tmp_path, write_classes):
    write_classes(tmp_path, {"a": 4}, size=(60, 40))
    files = scan_class_folders(tmp_path)
    return FileImages(files.opener(), files.targets, torch.tensor([3, 1]), form=ImageFormat((28, 28)), seed=7)


def test_file_images_depend_on_epoch_and_index_and_leave_the_generator_alone(file_images):
    state = torch.get_rng_state()
    first = file_images.__getitems__([(0, 0), (0, 1)])
    assert torch.equal(torch.get_rng_state(), state)
    assert first.image.shape == (2, 3, 28, 28)
    assert first.image.dtype == torch.uint8
    assert first.epoch.tolist() == [-1, -1]
    assert first.index.tolist() == [0, 1]
    torch.rand(3)
    assert torch.equal(file_images.__getitems__([(0, 1), (0, 0)]).image, first.image.flip(0))
    assert not torch.equal(file_images.__getitems__([(1, 0)]).image[0], first.image[0])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_file_images_are_random_resized_crops(tmp_path, write_classes, suffix):
    write_classes(tmp_path, {"a": 12}, size=(60, 40), suffix=suffix)
    files = scan_class_folders(tmp_path)
    dataset = FileImages(files.opener(), files.targets, torch.arange(12).flip(0), form=ImageFormat((28, 28)), seed=7)
    batch = dataset.__getitems__([(2, index) for index in range(12)])
    mirrored = 0
    for index, image in enumerate(batch.image):
        box, mirror = random_crop(60, 40, mix(7, 2, index, STREAM_TRANSFORM))
        cut = (
            read_image(files.paths[11 - index], ImageFormat((28, 28)))
            .crop(box)
            .resize((28, 28), Image.Resampling.BILINEAR)
        )
        expected = np.array(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else cut).transpose(2, 0, 1)
        apart = np.abs(image.numpy().astype(int) - expected)
        assert apart.max() <= 1  # torch and PIL round differently
        mirrored += mirror
    assert 0 < mirrored < 12
    assert batch.image.is_contiguous()


def test_file_images_evaluate_the_centre(file_images):
    path = str(file_images.opener(3))
    with Image.open(path) as image:
        resized = image.resize((48, 32), Image.Resampling.BILINEAR).crop((10, 2, 38, 30))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    assert torch.equal(file_images.__getitems__([0]).image[0], expected)
