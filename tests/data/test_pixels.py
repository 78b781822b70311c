"""Pixels as people have them: depths, orientation, transparency, channels, sizes."""

from __future__ import annotations

import importlib.util
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ackd_lightning.data import ImageFolderDataModule
from ackd_lightning.data.decoding import Encoded, load_image, read_image
from ackd_lightning.data.pixels import ImageFormat, fit, to_tensor
from ackd_lightning.errors import ACKDError

RGB = ImageFormat((4, 4))
GREY = ImageFormat((4, 4), channels=1)


def png16(pixels: np.ndarray) -> bytes:
    """A PNG with 16 bits for each channel, of which PIL writes grey ones only."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def values(path, form):
    return to_tensor(read_image(path, form), form)


def ppm16(pixels: np.ndarray, top: int, plain: bool = False) -> bytes:
    """A PPM whose header names ``top`` as the largest value, as text or in bytes."""
    height, width, _ = pixels.shape
    values = " ".join(map(str, pixels.flat)).encode() if plain else pixels.astype(">u2").tobytes()
    return f"P{3 if plain else 6} {width} {height} {top}\n".encode() + (b"# text\n" if plain else b"") + values


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_bits_of_a_16_bit_png_are_read(channels):
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    found = np.asarray(load_image(Encoded("x.png", png16(pixels))))
    assert found.dtype == np.uint16
    assert np.array_equal(found.reshape(5, 7, channels), pixels)


@pytest.mark.parametrize("orientation", [1, 6])
def test_grey_with_transparency_in_16_bits_is_turned_and_converted(tmp_path, orientation, monkeypatch):
    monkeypatch.setattr("ackd_lightning.data.decoding._orientation", lambda image: orientation)
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 2), dtype=np.uint16)
    (tmp_path / "x.png").write_bytes(png16(pixels))
    found = values(tmp_path / "x.png", ImageFormat((5, 7), channels=2, deep=True))
    expected = np.rot90(pixels, k=-1) if orientation == 6 else pixels
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected / 65535, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("top", [65535, 4095, 256])
def test_all_bits_of_a_ppm_are_read_and_scaled_by_its_header(plain, top):
    pixels = np.random.default_rng(0).integers(0, top + 1, (5, 7, 3), dtype=np.uint16)
    found = np.asarray(load_image(Encoded("x.ppm", ppm16(pixels, top, plain))))
    assert found.dtype == np.uint16
    assert np.array_equal(found, np.round(pixels * (65535 / top)))


@pytest.mark.parametrize("plain", [False, True])
def test_a_cut_ppm_is_named(plain):
    content = ppm16(np.full((5, 7, 3), 40_000, np.uint16), 65535, plain)
    with pytest.raises(ACKDError, match=r"could not read the image x\.ppm"):
        load_image(Encoded("x.ppm", content[:-20]))


def int32_tiff(path):
    Image.fromarray(np.full((4, 4), 3000, np.int32)).save(path)


def float_tiff(path):
    Image.fromarray(np.full((4, 4), 3000, np.float32)).save(path)


def signed_tiff(path):
    Image.fromarray(np.full((4, 4), -500, np.int32)).save(path)


def float_array(path):
    np.save(path, np.full((4, 4), 3000.0))


@pytest.mark.parametrize(
    ("name", "make", "value"),
    [
        ("x.tif", int32_tiff, 0.75),
        ("x.tif", float_tiff, 0.75),
        ("x.tif", signed_tiff, 0.0),
        ("x.npy", float_array, 0.75),
    ],
)
def test_an_unknown_range_is_refused_with_the_file_named_and_can_be_given(tmp_path, name, make, value):
    path = tmp_path / name
    make(path)
    with pytest.raises(ACKDError, match=rf"{name} .*value_range"):
        read_image(path, GREY)
    form = ImageFormat((4, 4), 1, (0.0, 4000.0), deep=True)
    torch.testing.assert_close(values(path, form), torch.full((1, 4, 4), value))


@pytest.mark.parametrize(
    ("array", "value"),
    [
        (np.full((4, 4), 0.25, np.float32), 0.25),
        (np.full((4, 4), 51, np.uint8), 0.2),
        (np.full((4, 4), 13107, np.uint16), 0.2),
        (np.ones((4, 4), bool), 1.0),
    ],
)
def test_arrays_are_scaled_by_the_range_of_their_type(tmp_path, array, value):
    np.save(tmp_path / "x.npy", array)
    form = ImageFormat((4, 4), deep=True)
    torch.testing.assert_close(values(tmp_path / "x.npy", form), torch.full((3, 4, 4), value))
    assert values(tmp_path / "x.npy", RGB).unique().tolist() == [round(255 * value)]


def test_a_header_that_python_reads_wrongly_beside_another_thread_is_read_again(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.full((4, 4), 51, np.uint8))
    load, failures = np.load, [SystemError("AST constructor recursion depth mismatch (before=39, after=36)")]

    def sometimes(*args, **kwargs):
        if failures:
            raise failures.pop()
        return load(*args, **kwargs)

    monkeypatch.setattr(np, "load", sometimes)
    assert values(tmp_path / "x.npy", RGB).unique().tolist() == [51]
    failures[:] = [SystemError("another")] * 9
    with pytest.raises(SystemError, match="another"):
        values(tmp_path / "x.npy", RGB)


def grey_12_bits(folder, number):
    Image.fromarray(np.full((16, 16), 4095 - number, np.uint16)).save(folder / f"{number}.png")


def colours_12_bits(folder, number):
    (folder / f"{number}.png").write_bytes(png16(np.full((16, 16, 3), 4000 + number, np.uint16)))


def opaque_12_bits(folder, number):
    pixels = np.full((16, 16, 4), 4000 + number, np.uint16)
    pixels[..., 3] = 65535
    (folder / f"{number}.png").write_bytes(png16(pixels))


def opaque_grey_12_bits(folder, number):
    (folder / f"{number}.png").write_bytes(png16(np.full((16, 16, 2), (4000 + number, 65535), np.uint16)))


def ppm_12_bits(folder, number):
    (folder / f"{number}.ppm").write_bytes(ppm16(np.full((16, 16, 3), 4000 + number, np.uint16), 65535))


def array_10_bits(folder, number):
    np.save(folder / f"{number}.npy", np.full((16, 16), 1000 + number, np.uint16))


@pytest.mark.parametrize("size", [16, 72], ids=["in memory", "from files"])
@pytest.mark.parametrize(
    ("write", "top"),
    [
        (grey_12_bits, 4095),
        (colours_12_bits, 4095),
        (opaque_12_bits, 4095),
        (opaque_grey_12_bits, 4095),
        (ppm_12_bits, 4095),
        (array_10_bits, 1023),
    ],
)
def test_fewer_bits_than_the_file_type_are_refused_or_scaled_as_told(tmp_path, write, top, size):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                write(tmp_path / part / name, number)
    options = {"image_size": size, "batch_size": 4, "val_fraction": 0.0, "cache": False, "num_workers": 0}
    with pytest.raises(ACKDError, match=rf"value_range to \[0, {top}\]"):
        ImageFolderDataModule(tmp_path, **options).prepare_data()
    module = ImageFolderDataModule(tmp_path, value_range=[0, top], **options)
    image = next(iter(module.train_dataloader())).image
    assert image.dtype == torch.float32
    assert image.max() <= 1
    inner = image[..., size // 2, size // 2]
    assert inner.min() > 0.95
    assert len(module.train_dataloader().dataset[0].image.unique()) <= 2  # with the zeros of the padding


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photos_are_turned_as_the_camera_states(tmp_path, suffix, orientation):
    image = Image.new("RGB", (24, 16), "black")
    image.paste((255, 255, 255), (0, 0, 12, 8))  # upper left
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x{suffix}", exif=exif)
    found = np.asarray(read_image(tmp_path / f"x{suffix}", GREY))
    expected = np.rot90(np.asarray(image.convert("L")), {1: 0, 3: 2, 6: 3, 8: 1}[orientation])
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < 8


def rgba(path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(path)


def grey_alpha(path):
    Image.new("LA", (4, 4), (0, 0)).save(path)


def palette(path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 0, 0, 0])
    image.save(path, transparency=1)


def colour_key(path):
    Image.new("RGB", (4, 4), (0, 0, 0)).save(path, transparency=(0, 0, 0))


def deep_alpha(path):
    path.write_bytes(png16(np.zeros((4, 4, 4), np.uint16)))


@pytest.mark.parametrize("make", [rgba, grey_alpha, palette, colour_key, deep_alpha])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("background", "level"), [("white", 255), ("rgb(128,128,128)", 128)])
def test_transparent_pixels_show_the_background(tmp_path, make, channels, background, level):
    make(tmp_path / "x.png")
    found = values(tmp_path / "x.png", ImageFormat((4, 4), channels, background=background))
    assert found.shape == (channels, 4, 4)
    assert found.unique().tolist() == [level]


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((6, 8, 5), 5), ((5, 6, 8), 5), ((6, 8, 16), 16), ((16, 6, 8), 16), ((6, 8), 1), ((6, 8, 2), 2)],
)
def test_arrays_of_many_channels(tmp_path, shape, channels):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))
    form = ImageFormat((4, 4), channels)
    image = to_tensor(fit(read_image(tmp_path / "x.npy", form), form.size), form)
    assert image.shape == (channels, 4, 4)
    with pytest.raises(ACKDError, match=r"x\.npy has \d+ channels"):
        read_image(tmp_path / "x.npy", ImageFormat((4, 4), 7))


@pytest.mark.skipif(importlib.util.find_spec("tifffile") is None, reason="needs tifffile")
@pytest.mark.parametrize("shape", [(6, 16, 16), (16, 16, 3)])
def test_tiff_files_that_pillow_does_not_read(tmp_path, shape):
    import tifffile

    array = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", array)
    channels = min(shape)
    form = ImageFormat((16, 16), channels, deep=True)
    expected = torch.from_numpy(array.astype(np.float32) / 65535)
    expected = expected if shape[0] == channels else expected.permute(2, 0, 1)
    torch.testing.assert_close(values(tmp_path / "x.tif", form), expected)


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["grey", "grey 16", "colour 16"])
def test_tiff_files_are_turned_as_their_camera_states(tmp_path, turn, kind):
    shape = (6, 10, 3) if kind == "colour 16" else (6, 10)
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8 if kind == "grey" else np.uint16)
    if kind == "colour 16":
        tifffile = pytest.importorskip("tifffile")
        tifffile.imwrite(tmp_path / "x.tif", array, extratags=[(274, "H", 1, turn, True)])
    else:
        Image.fromarray(array).save(tmp_path / "x.tif", tiffinfo={274: turn})
    expected = np.rot90(array, {1: 0, 3: 2, 6: -1, 8: 1}[turn])
    for file in (tmp_path / "x.tif", Encoded("x.tif", (tmp_path / "x.tif").read_bytes())):
        assert np.array_equal(np.asarray(load_image(file)), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("pages", [1, 2])
def test_white_is_white_in_every_tiff(tmp_path, dtype, pages):
    tifffile = pytest.importorskip("tifffile")
    array = np.zeros((pages, 6, 8)[-1 - pages :], dtype)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric="miniswhite")
    assert (np.asarray(load_image(tmp_path / "x.tif")) == np.iinfo(dtype).max).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_as_cielab_are_converted(tmp_path, channels):
    Image.new("LAB", (32, 32), (255, 128, 128)).save(tmp_path / "a.tif")  # white
    image = np.asarray(read_image(tmp_path / "a.tif", ImageFormat((32, 32), channels)))
    assert image.shape == ((32, 32) if channels == 1 else (32, 32, 3))
    assert image.min() >= 250


def test_an_empty_array_is_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 8), np.uint8))
    with pytest.raises(ACKDError, match=r"x\.npy is an array of shape \(0, 8\)"):
        read_image(tmp_path / "x.npy", RGB)


def array_file(path, array):
    np.save(path.with_suffix(".npy"), array)


def tiff_file(path, array):
    import tifffile

    options = {"photometric": "rgb", "extrasamples": ["unspecified"] * (array.shape[-1] - 3)}
    options = options if array.shape[-1] > 3 else {"photometric": "minisblack"}
    tifffile.imwrite(path.with_suffix(".tif"), array, planarconfig="contig", **options)


@pytest.mark.skipif(importlib.util.find_spec("tifffile") is None, reason="needs tifffile")
@pytest.mark.parametrize("make", [array_file, tiff_file])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(6, 8, 2), (6, 8, 4), (6, 8, 5)])
def test_channels_that_are_not_transparency_are_neither_alpha_nor_dropped(tmp_path, make, dtype, shape):
    make(tmp_path / "x", np.zeros(shape, dtype))
    (path,) = tmp_path.iterdir()
    channels = shape[-1]
    assert read_image(path, ImageFormat((4, 4), channels, deep=True)).shape == (channels, 6, 8)
    for wrong in (1, 3):
        with pytest.raises(ACKDError, match=f"has {channels} channels"):
            read_image(path, ImageFormat((4, 4), wrong))


@pytest.fixture
def spectral(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name in ("field", "forest"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                array = generator.integers(0, 65536, (20, 28, 6), dtype=np.uint16)
                np.save(tmp_path / part / name / f"{number}.npy", array)
    return tmp_path


@pytest.mark.parametrize("size", [(16, 24), (68, 48)], ids=["in memory", "from files"])
def test_rectangular_images_of_six_channels_in_16_bits_through_augmentation_normalisation_and_cache(spectral, size):
    options = {"image_size": size, "channels": 6, "mean": [0.5] * 6, "std": [0.25] * 6, "batch_size": 4}
    module = ImageFolderDataModule(spectral, val_fraction=0.0, **options)
    assert module.info.image_shape == (6, *size)
    with pytest.raises(ACKDError, match="image_size is"):
        ImageFolderDataModule(spectral, **{**options, "image_size": (16, 24, 3)})
    first = [module.on_after_batch_transfer(batch, 0) for batch in module.train_dataloader()]
    assert all(batch.image.shape == (4, 6, *size) for batch in first)
    again = ImageFolderDataModule(spectral, val_fraction=0.0, **options)  # from the cache
    second = [again.on_after_batch_transfer(batch, 0) for batch in again.train_dataloader()]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.image, other.image)
    test = next(iter(module.test_dataloader())).image
    assert 0.45 < test.mean() < 0.55
    assert len(test.unique()) > 256


@pytest.mark.parametrize(("channels", "options"), [(2, {}), (5, {"mean": [0.5] * 5}), (3, {"mean": [0.5] * 4})])
def test_normalisation_of_other_channels_has_to_be_given(spectral, channels, options):
    with pytest.raises(ACKDError, match=f"channels is {channels}"):
        ImageFolderDataModule(spectral, channels=channels, **options)


@pytest.mark.parametrize("options", [{"value_range": [5, 5]}, {"background": "whit"}, {"channels": 17}])
def test_bad_options_are_named(spectral, options):
    with pytest.raises(ACKDError, match=next(iter(options))):
        ImageFolderDataModule(spectral, **options)


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="needs pillow-heif")
def test_photos_of_phones(tmp_path):
    import pillow_heif

    image = Image.new("RGB", (64, 48), (200, 30, 30))
    pillow_heif.from_pillow(image).save(tmp_path / "x.heic")
    found = read_image(tmp_path / "x.heic", RGB)
    assert found.size == (64, 48)
    assert found.getpixel((30, 20))[0] > 180


def grey_16_bits(path):
    Image.fromarray(np.full((32, 32), 60_000, np.uint16)).save(path)


def colours_16_bits(path):
    path.write_bytes(png16(np.full((32, 32, 3), 60_000, np.uint16)))


def grey_8_bits(path):
    Image.fromarray(np.full((32, 32), 200, np.uint8)).save(path)


def mixed(folder, first, rest):
    for part in ("train", "test"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for number in range(4):
                (first if (part, name, number) == ("train", "a", 0) else rest)(folder / part / name / f"{number}.png")


def of_mixed(folder, **options):
    usual = {"batch_size": 2, "val_fraction": 0.0, "image_size": 32, "num_workers": 0}
    module = ImageFolderDataModule(folder, **{**usual, **options})
    module.setup()
    return module


@pytest.mark.parametrize("size", [32, 80], ids=["decoded", "checked"])
@pytest.mark.parametrize(
    ("first", "rest", "said"),
    [
        (grey_8_bits, grey_16_bits, "more than 8 bits and are reduced"),
        (grey_8_bits, colours_16_bits, "more than 8 bits and are reduced"),
        (grey_16_bits, grey_8_bits, "8 bits; they are read as they are"),
    ],
)
def test_images_of_another_depth_than_the_first_are_counted_every_time(tmp_path, first, rest, said, size, caplog):
    mixed(tmp_path, first, rest)
    for _ in range(2):  # the second one reads the cache
        caplog.clear()
        of_mixed(tmp_path, image_size=size)
        assert re.search(rf"7 of 8 images in .*train.*{said}", caplog.text)
        assert re.search(rf"8 of 8 images in .*test.*{said}", caplog.text)


@pytest.mark.parametrize(("first", "rest"), [(grey_8_bits, grey_16_bits), (grey_16_bits, grey_8_bits)])
def test_a_range_of_values_for_images_of_several_depths_is_refused(tmp_path, first, rest):
    mixed(tmp_path, first, rest)
    with pytest.raises(ACKDError, match="value_range"):
        of_mixed(tmp_path, value_range=(0, 4095))


@pytest.mark.parametrize("kind", ["tif", "npy"])
def test_pixels_that_are_not_numbers_are_counted(tmp_path, kind):
    pixels, path = np.full((4, 4), 0.5, np.float32), tmp_path / f"x.{kind}"
    pixels[0, :3] = np.nan
    np.save(path, pixels) if kind == "npy" else Image.fromarray(pixels).save(path)
    with pytest.raises(ACKDError, match=rf"x\.{kind} has 3 pixels that are NaN"):
        read_image(path, GREY)
    found = values(path, ImageFormat((4, 4), 1, (0.0, 1.0), deep=True))  # what the message proposes
    assert found[0, 0].tolist() == [0.0, 0.0, 0.0, 0.5]


@pytest.mark.parametrize(("argument", "value"), [("image_size", -3), ("channels", 99), ("cache", "maybe")])
def test_a_wrong_argument_names_the_class_that_was_given_it(tmp_path, argument, value):
    with pytest.raises(ACKDError, match=rf"{argument} is .* in ImageFolderDataModule"):
        ImageFolderDataModule(tmp_path, **{argument: value})
