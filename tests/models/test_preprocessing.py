"""Images as a teacher was trained on them: every statistic, size and number of channels."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ackd_lightning.errors import ACKDError
from ackd_lightning.models.preprocessing import Conversion, Preprocessing, stated_by, usable_size
from ackd_lightning.models.teacher import FrozenTeacher
from ackd_lightning.models.zoo import create_model
from ackd_lightning.types import DataInfo

HALF = Preprocessing((0.5,) * 3, (0.5,) * 3)
COLOURS = DataInfo(4, 16, (0.48, 0.45, 0.41), (0.23, 0.22, 0.25))
GREY = DataInfo(4, 16, (0.3,), (0.2,))


class Seen(nn.Module):
    """Network that keeps the images it gets."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 4, 1)
        self.image = torch.empty(0)

    def forward(self, image):
        if not image.is_meta:
            self.image = image
        return self.stem(image).mean(dim=(2, 3))


def pixels(channels=3, height=16, width=16):
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def normalised(values, info):
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (info.mean, info.std))
    return (values - mean) / std


def seen(info, *, channels=3, **options):
    """Images that a teacher's network gets for pixels of the data."""
    network = Seen(channels)
    teacher = FrozenTeacher(network, copy_network=False, **options)
    teacher.adapt_to(info)
    teacher(normalised(pixels(*info.image_shape), info))
    return network.image, teacher.conversion.notes


def test_a_network_of_timm_gets_its_own_statistics():
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=16, patch_size=8)
    teacher = FrozenTeacher(network)
    teacher.adapt_to(COLOURS)
    expected = (pixels() - 0.5) / 0.5
    torch.testing.assert_close(teacher.conversion(normalised(pixels(), COLOURS)), expected, rtol=1e-5, atol=1e-5)
    assert any("pretrained_cfg" in note for note in teacher.conversion.notes)


@pytest.mark.parametrize("number", [0.5, 0.0])
def test_given_statistics_go_before_those_of_the_network(number):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=16, patch_size=8)
    teacher = FrozenTeacher(network, mean=(number,) * 3, std=(1.0,) * 3)
    teacher.adapt_to(COLOURS)
    expected = pixels() - number
    torch.testing.assert_close(teacher.conversion(normalised(pixels(), COLOURS)), expected, rtol=1e-5, atol=1e-5)


def test_a_network_for_pixels_up_to_255_is_described_by_its_statistics():
    image, _ = seen(COLOURS, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    torch.testing.assert_close(image, 255 * pixels(), rtol=1e-4, atol=1e-3)


def test_statistics_of_bytes_are_refused():
    with pytest.raises(ACKDError, match=r"123\.7.*255 \(0\.4851"):
        Preprocessing((123.7, 116.3, 103.5), (58.4, 57.1, 57.4))


def test_grey_data_become_three_channels():
    image, notes = seen(GREY, mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.testing.assert_close(image, ((pixels(1) - 0.5) / 0.5).expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-5)
    assert any("repeated 3 times" in note for note in notes)
    unknown, _ = seen(GREY)
    torch.testing.assert_close(unknown, normalised(pixels(1), GREY).expand(-1, 3, -1, -1))
    same, _ = seen(GREY, mean=(0.3,) * 3, std=(0.2,) * 3)
    torch.testing.assert_close(same, normalised(pixels(1), GREY).expand(-1, 3, -1, -1))


def test_colours_become_grey():
    image, notes = seen(COLOURS, channels=1, mean=(0.4,), std=(0.3,))
    grey = (pixels() * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(image, (grey - 0.4) / 0.3, rtol=1e-5, atol=1e-5)
    assert any("grey" in note for note in notes)


@pytest.mark.parametrize(("given", "needed"), [(4, 3), (3, 4), (2, 1), (13, 3)])
def test_channels_without_a_meaning_are_refused(given, needed):
    info = DataInfo(4, 16, (0.5,) * given, (0.5,) * given)
    with pytest.raises(ACKDError, match=f"{needed} channels .* {given}"):
        FrozenTeacher(Seen(needed)).adapt_to(info)


def test_statistics_are_one_per_channel_that_the_network_reads():
    with pytest.raises(ACKDError, match=r"1 values .* 3"):
        FrozenTeacher(Seen(3), mean=(0.5,), std=(0.5,)).adapt_to(COLOURS)


@pytest.mark.parametrize(("own", "data"), [((24, 12), 16), (24, (16, 20)), ((8, 16), (12, 12)), (16, (16, 12))])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_other_sizes_also_rectangular(own, data, interpolation):
    info = DataInfo(4, data)
    network = Seen()
    teacher = FrozenTeacher(network, input_size=own, interpolation=interpolation, copy_network=False)
    teacher.adapt_to(info)
    images = pixels(*info.image_shape)
    teacher(images)
    size = (own, own) if isinstance(own, int) else own
    if interpolation == "nearest":
        expected = F.interpolate(images, size, mode="nearest-exact")
    else:
        expected = F.interpolate(images, size, mode=interpolation, antialias=True, align_corners=False)
    torch.testing.assert_close(network.image, expected)
    assert any(f"{size[0]} x {size[1]}" in note for note in teacher.conversion.notes)


@pytest.mark.parametrize(
    ("name", "side", "size"),
    [
        ("timm:vit_tiny_patch16_224", 32, (224, 224)),
        ("timm:deit3_small_patch16_384", 64, (384, 384)),
        ("vit_b_16", 96, 224),
        ("alexnet", 32, 64),
        ("inception_v3", 64, 96),
    ],
)
def test_a_network_that_cannot_read_the_datas_size_gets_one_that_it_can(name, side, size):
    with torch.device("meta"):
        network = create_model(name, 4)
    found = usable_size(network, DataInfo(4, side), given=None, stated=None, channels=3, name=name)
    assert found == size


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "vit_b_16"])
def test_a_size_that_was_asked_for_is_refused_with_those_that_work(name):
    with torch.device("meta"):
        network = create_model(name, 4)
    with pytest.raises(ACKDError, match=r"96 x 96.*such as 224 x 224"):
        usable_size(network, DataInfo(4, 32), given=96, stated=None, channels=3, name=name)


def test_a_network_that_reads_no_size_is_refused():
    with pytest.raises(ACKDError, match="any other size"):
        usable_size(nn.Linear(7, 4), DataInfo(4, 32), given=None, stated=None, channels=3, name="it")


def test_the_size_of_published_weights_counts_for_their_own_classes():
    own = timm.create_model("resnet10t")
    other = timm.create_model("resnet10t", num_classes=4)
    assert stated_by(own).input_size == (176, 176)
    assert stated_by(other).input_size is None
    assert stated_by(other).mean == (0.485, 0.456, 0.406)
    assert stated_by(Seen()) == Preprocessing()


def test_what_is_unknown_is_said():
    assert any("unknown" in note for note in Conversion(None, COLOURS).notes)
    assert any("unknown" in note for note in Conversion(HALF, DataInfo(4, 16)).notes)
    assert Conversion(Preprocessing(COLOURS.mean, COLOURS.std, 16), COLOURS).notes == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_in_another_type_reads_the_same_images(dtype):
    torch.manual_seed(0)
    network = create_model("resnet8", 4).eval()
    images = normalised(pixels(), COLOURS)
    expected = FrozenTeacher(network)(images)
    teacher = FrozenTeacher(network.to(dtype), mean=COLOURS.mean, std=COLOURS.std, input_size=16)
    teacher.adapt_to(COLOURS)
    found = teacher(images)
    assert {found.logits.dtype, found.embedding.dtype, *(each.dtype for each in found.features)} == {torch.float32}
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.05, atol=0.05)
    assert next(teacher.network.parameters()).dtype is dtype
