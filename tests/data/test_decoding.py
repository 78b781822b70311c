from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ackd_lightning.data import ImageFolderDataModule, decoding, path_table, reading
from ackd_lightning.data.datasets import augmented_crop, reduction
from ackd_lightning.data.decoding import load_for_crop, load_image, read_image
from ackd_lightning.data.folders import scan_class_folders
from ackd_lightning.data.jpeg import is_whole_jpeg
from ackd_lightning.data.pixels import ImageFormat, convert, fit, height_and_width, to_tensor
from ackd_lightning.data.reading import check_files, check_image_file, decode
from ackd_lightning.data.transforms import random_crop
from ackd_lightning.errors import ACKDError

FORM = ImageFormat((32, 32))


def grey(path):
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(path)
    return (77, 77, 77)


def test_a_jpeg_2000_of_deep_colours_is_refused(tmp_path):
    path = tmp_path / "a.jp2"
    for values in (np.full((8, 8, 3), 250, np.uint8), np.full((8, 8), 77 * 257, np.uint16)):
        Image.fromarray(values).save(path)
        np.testing.assert_array_equal(np.asarray(load_image(path)), values)
    Image.fromarray(np.full((8, 8, 3), 250, np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"\xff\x4f\xff\x51") + 42] = 11  # one less than the bits of the first colour
    path.write_bytes(content)
    with pytest.raises(ACKDError, match=r"a\.jp2 is a JPEG 2000 with more than 8 bits for each colour"):
        load_image(path)


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


def test_cmyk_becomes_opaque_rgb_for_four_channels(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    red, green, blue, alpha = read_image(tmp_path / "x.jpg", ImageFormat((8, 8), channels=4)).getpixel((4, 4))
    assert red > 200
    assert max(green, blue) < 60
    assert alpha == 255


def photo(path, width, height, orientation=1):
    """Smooth colours that tell left from right and top from bottom."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * columns / width, 255 * rows / height, 128 + 60 * np.sin(columns / 90)], axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, quality=95, exif=exif)


@pytest.mark.parametrize(("width", "height", "by"), [(127, 95, 1), (128, 99, 2), (131, 260, 4), (900, 521, 8)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("library", ["PIL", "simplejpeg"])
def test_a_large_photo_is_decoded_smaller_for_its_crop(tmp_path, monkeypatch, library, width, height, by, orientation):
    if library == "PIL":
        monkeypatch.setattr(decoding, "_simplejpeg", lambda: None)
    else:
        pytest.importorskip("simplejpeg")
    photo(tmp_path / "x.jpg", width, height, orientation)
    seen = (width, height) if orientation == 6 else (height, width)
    raw, whole = load_for_crop(tmp_path / "x.jpg", 3, lambda *size: by if size == seen else 1)
    assert whole == (None if by == 1 else seen)
    assert height_and_width(raw) == tuple(-(-side // by) for side in seen)
    form = ImageFormat((16, 16))
    for seed in range(5):
        small = augmented_crop(raw, form, seed, 0.3, whole).float()
        large = augmented_crop(load_image(tmp_path / "x.jpg"), form, seed, 0.3).float()
        assert (small - large).abs().mean() < 3
        assert (small - large).abs().max() < 20


@pytest.mark.parametrize("by", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_simplejpeg_decodes_what_pil_decodes(tmp_path, monkeypatch, by, channels):
    photo(tmp_path / "rgb.jpg", 203, 149)
    Image.open(tmp_path / "rgb.jpg").convert("L").save(tmp_path / "grey.jpg", quality=80)
    file, form = tmp_path / ("grey.jpg" if channels == 1 else "rgb.jpg"), ImageFormat((8, 8), channels=channels)
    found = []
    for library in (decoding._simplejpeg(), None):
        monkeypatch.setattr(decoding, "_simplejpeg", lambda library=library: library)
        raw, _ = load_for_crop(file, channels, lambda *size: by)
        found.append(to_tensor(convert(raw, form, file.name), form))
        assert isinstance(raw, torch.Tensor) is (library is not None)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("library", ["PIL", "simplejpeg"])
def test_a_cut_photo_is_named(tmp_path, monkeypatch, library):
    if library == "PIL":
        monkeypatch.setattr(decoding, "_simplejpeg", lambda: None)
    else:
        pytest.importorskip("simplejpeg")
    photo(tmp_path / "x.jpg", 203, 149)
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-900])
    with pytest.raises(ACKDError, match=r"x\.jpg.*replace the file or delete it"):
        load_for_crop(tmp_path / "x.jpg", 3, lambda *size: 1)


def test_a_photo_is_never_decoded_smaller_than_its_crop_needs(tmp_path):
    form, seen = ImageFormat((24, 16)), set()
    for seed in range(200):
        factor = reduction(form, seed, 0.08)(300, 200)
        (left, top, right, bottom), _ = random_crop(200, 300, seed, 0.08)
        assert factor == 1 or (bottom - top >= 24 * factor and right - left >= 16 * factor)
        assert factor == 8 or bottom - top < 48 * factor or right - left < 32 * factor
        seen.add(factor)
    assert seen == {2, 4, 8}


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


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_is_checked_by_its_header_and_its_end(tmp_path, mode, picture):
    path = tmp_path / "a.jpg"
    picture(0, 40).convert(mode).save(path, progressive=mode == "L")
    whole = path.read_bytes()
    assert is_whole_jpeg(os.fsencode(path))
    scan = whole.index(b"\xff\xda")
    for broken in (b"", whole[:9], whole[:-30], whole[2:], b"\xff\xd8" + whole[scan:], whole[:20] + whole[24:]):
        path.write_bytes(broken)
        assert not is_whole_jpeg(os.fsencode(path))


def test_every_file_is_looked_at_once_at_each_start(tmp_path, write_classes, monkeypatch):
    write_classes(tmp_path / "train", {"x": 5, "y": 3}, size=80, suffix=".jpg")
    data = [ImageFolderDataModule(tmp_path, image_size=72, val_fraction=0) for _ in range(4)]
    opened, whole = [], reading.is_whole_jpeg
    monkeypatch.setattr(reading, "is_whole_jpeg", lambda path: opened.append(path) or whole(path))
    monkeypatch.setattr(path_table, "status_of", lambda path: pytest.fail("asked again"))  # the listing has it
    data[0].setup()
    assert len(opened) == len(set(opened)) == 8
    data[1].setup()
    assert len(opened) == 8
    (tmp_path / "train/x/0003.jpg").write_bytes(b"another")  # in place: the folder does not show it
    with pytest.raises(ACKDError, match="0003"):
        data[2].setup()
    (tmp_path / "train/x/0003.jpg").unlink()
    data[3].setup()
    assert len(data[3].train_targets) + len(data[3].test_dataloader().dataset) == 7


def test_files_are_checked_once(tmp_path, write_classes):
    write_classes(tmp_path / "a", {"x": 3})
    files = scan_class_folders(tmp_path / "a")
    check_files(files, FORM, tmp_path / "checked.pt")
    broken = files.paths[1]
    before = broken.stat()
    broken.write_bytes(b"0" * before.st_size)
    os.utime(broken, ns=(before.st_atime_ns, before.st_mtime_ns))
    files = scan_class_folders(tmp_path / "a")
    check_files(files, FORM, tmp_path / "checked.pt")  # size and time as before: not read again
    os.utime(broken)
    files = scan_class_folders(tmp_path / "a")
    with pytest.raises(ACKDError, match=r"0001\.png"):
        check_files(files, FORM, tmp_path / "checked.pt")


def test_a_jpeg_of_too_many_pixels_is_opened_to_know(tmp_path):
    """PIL refuses it, so its header alone does not make it a good image."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    place = content.index(b"\xff\xc0") + 5
    assert is_whole_jpeg(os.fsencode(tmp_path / "a.jpg"))
    (tmp_path / "a.jpg").write_bytes(content[:place] + (20_000).to_bytes(2, "big") * 2 + content[place + 4 :])
    assert not is_whole_jpeg(os.fsencode(tmp_path / "a.jpg"))
