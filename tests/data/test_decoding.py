from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ackd_lightning.data.decoding import read_image
from ackd_lightning.data.folders import scan_class_folders
from ackd_lightning.data.pixels import ImageFormat, fit, to_tensor
from ackd_lightning.data.reading import check_files, check_image_file, decode
from ackd_lightning.errors import ACKDError

FORM = ImageFormat((32, 32))


def grey(path):
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(path)
    return (77, 77, 77)


def sixteen_bit(path):
    Image.fromarray(np.full((4, 4), 77 * 256 + 200, np.uint16)).save(path)
    return (77, 77, 77)


def palette(path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path, transparency=b"\xff\xff")
    return (10, 20, 30)


def with_alpha(path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(path)
    return (132, 137, 142)  # on white


def one_bit(path):
    Image.new("1", (4, 4), 1).save(path)
    return (255, 255, 255)


@pytest.mark.parametrize("make", [grey, sixteen_bit, palette, with_alpha, one_bit])
def test_every_mode_becomes_rgb(tmp_path, make):
    colour = make(tmp_path / "x.png")
    image = to_tensor(read_image(tmp_path / "x.png", FORM), FORM)
    assert image.dtype == torch.uint8
    assert tuple(image[:, 1, 1].tolist()) == colour


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    red, green, blue = read_image(tmp_path / "x.jpg", FORM).getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60


def truncated_jpeg(path, picture):
    picture(0, 64).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-400])


def truncated_png(path, picture):
    picture(0, 64).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:-400])


def no_image(path, picture):
    path.write_text("not an image")


def no_bytes(path, picture):
    path.write_bytes(b"")


@pytest.mark.parametrize("read", [read_image, check_image_file])
@pytest.mark.parametrize("break_file", [truncated_jpeg, truncated_png, no_image, no_bytes])
def test_a_broken_image_is_named(tmp_path, picture, break_file, read):
    path = tmp_path / "bad.jpg"
    break_file(path, picture)
    with pytest.raises(
        ACKDError, match=r"could not read the image .*bad\.jpg .*replace the file or delete it"
    ) as caught:
        read(path, FORM)
    assert "\n" not in str(caught.value)


def test_an_image_with_bytes_after_its_end_is_good(tmp_path, picture):
    picture(0, 64).save(tmp_path / "x.jpg")
    with (tmp_path / "x.jpg").open("ab") as file:
        file.write(b"\0" * 100)
    check_image_file(tmp_path / "x.jpg", FORM)


def test_fit_resizes_the_shorter_side_and_cuts_the_centre(picture):
    image = picture(0, 32)
    assert fit(image, (32, 32)) is image
    wide = Image.new("RGB", (80, 40))
    wide.paste((255, 0, 0), (20, 0, 60, 40))
    square = fit(wide, (20, 20))
    assert square.size == (20, 20)
    assert square.getpixel((10, 10)) == (255, 0, 0)


def test_decode_keeps_order_and_pixels(tmp_path, write_classes, picture):
    write_classes(tmp_path, {"a": 3, "b": 2}, size=16)
    pixels = decode(scan_class_folders(tmp_path), ImageFormat((16, 16)))
    assert pixels.images.shape == (5, 3, 16, 16)
    for position, seed in enumerate([0, 1, 2, 1000, 1001]):
        expected = torch.from_numpy(np.array(picture(seed, 16))).permute(2, 0, 1)
        assert torch.equal(pixels.images[position], expected)


def test_files_are_checked_once(tmp_path, write_classes):
    write_classes(tmp_path / "a", {"x": 3})
    files = scan_class_folders(tmp_path / "a")
    check_files(files, FORM, "", tmp_path / "checked.pt")
    broken = files.paths[1]
    before = broken.stat()
    broken.write_bytes(b"0" * before.st_size)
    os.utime(broken, ns=(before.st_atime_ns, before.st_mtime_ns))
    check_files(files, FORM, "", tmp_path / "checked.pt")  # size and time as before: not read again
    os.utime(broken)
    with pytest.raises(ACKDError, match=r"0001\.png"):
        check_files(files, FORM, "", tmp_path / "checked.pt")
