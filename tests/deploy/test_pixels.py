"""Images are prepared exactly as evaluation in training did."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ackd_lightning.data import ImageFolderDataModule
from ackd_lightning.deploy.description import Description
from ackd_lightning.deploy.pixels import Preprocessing
from ackd_lightning.errors import ACKDError


def described(data) -> Description:
    plain = data.preprocessing
    if plain["value_range"]:
        plain["value_range"] = tuple(plain["value_range"])
    return Description("resnet8", 2, data.input_size, mean=data.mean, std=data.std, **plain)


def folder(root, save, ending):
    """Eight images of different sizes in two classes."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            for number in range(4):
                path = root / part / name / f"{number}.{ending}"
                path.parent.mkdir(parents=True, exist_ok=True)
                save(generator, (40 + 7 * number, 90 - 5 * number), path)
    return root


def colour(generator, size, path):
    Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def transparent(generator, size, path):
    Image.fromarray(generator.integers(0, 256, (*size, 4), dtype=np.uint8), "RGBA").save(path)


def deep(generator, size, path):
    Image.fromarray(generator.integers(0, 65536, size, dtype=np.uint16)).save(path)


def bands(generator, size, path):
    np.save(path, generator.integers(0, 256, (*size, 6), dtype=np.uint8))


CASES = {
    "small": (colour, "png", {"image_size": 32}),
    "large": (colour, "jpg", {"image_size": 72}),
    "rectangle": (colour, "png", {"image_size": (24, 40)}),
    "large rectangle": (colour, "png", {"image_size": (80, 66)}),
    "grey": (colour, "png", {"image_size": 32, "channels": 1}),
    "transparent": (transparent, "png", {"image_size": 72, "background": "red"}),
    "16 bits": (deep, "png", {"image_size": 32, "channels": 1}),
    "range": (deep, "png", {"image_size": 72, "channels": 1, "value_range": [100, 40_000]}),
    "6 channels": (bands, "npy", {"image_size": 32, "channels": 6, "mean": [0.5] * 6, "std": [0.25] * 6}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*mode.*parameter is deprecated:DeprecationWarning")
def test_pixels_are_those_of_the_data_module(tmp_path, case):
    save, ending, options = CASES[case]
    root = folder(tmp_path, save, ending)
    data = ImageFolderDataModule(root, batch_size=2, val_fraction=0.25, cache=False, **options)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.loader_in_order("test")))
    expected = data.on_after_batch_transfer(batch, 0).image
    found = Preprocessing(described(data)).batch([root / "test" / name for name in data.image_names("test")])
    assert torch.equal(found, expected)


def test_files_images_and_tensors_give_the_same_pixels(tmp_path):
    colour(np.random.default_rng(0), (50, 70), tmp_path / "a.png")
    preprocessing = Preprocessing(Description("resnet8", 2, 32, mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=0.875))
    image = Image.open(tmp_path / "a.png")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    first = preprocessing.pixels(tmp_path / "a.png")
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.uint8
    for other in (str(tmp_path / "a.png"), image, tensor):
        assert torch.equal(preprocessing.pixels(other), first)
    as_float = preprocessing.pixels(tensor / 255)
    assert (as_float.int() - first.int()).abs().max() <= 1
    assert torch.equal(preprocessing.raw(preprocessing.normalised(first[None]))[0], first)


@pytest.mark.parametrize("pixels", ["float32", "uint8"])
def test_a_tensor_from_0_to_1_is_scaled_already_and_one_of_bytes_is_not(pixels):
    options = {"channels": 1, "value_range": (0.0, 204.0), "pixels": pixels}
    preprocessing = Preprocessing(Description("resnet8", 2, 16, mean=(0.5,), std=(0.5,), **options))
    for image in (torch.full((1, 16, 16), 0.5), torch.full((1, 16, 16), 102, dtype=torch.uint8)):
        assert abs(float(preprocessing.batch([image]).mean())) < 0.01


def test_every_grey_level_comes_back():
    preprocessing = Preprocessing(Description("r", 2, 16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(preprocessing.raw(preprocessing.normalised(levels)), levels)


@pytest.mark.parametrize(
    "image",
    [
        "nowhere.png",
        torch.zeros(3, 8, dtype=torch.uint8),
        torch.zeros(0, 8, 8, dtype=torch.uint8),
        torch.zeros(5, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.int64),
        torch.full((3, 8, 8), 7.0),
    ],
    ids=["no file", "two axes", "empty", "5 channels", "int64", "values above 1"],
)
def test_what_is_not_an_image_is_refused(image):
    preprocessing = Preprocessing(Description("resnet8", 2, 8, mean=(0.5,) * 3, std=(0.2,) * 3))
    with pytest.raises(ACKDError):
        preprocessing.pixels(image)


def test_unknown_statistics_are_refused():
    with pytest.raises(ACKDError, match="mean and std"):
        Preprocessing(Description("resnet8", 2, 8))
