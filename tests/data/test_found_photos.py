"""Photos as people have them: odd folders, renamed and damaged files, equal files, labels like 1e2."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ackd_lightning.commands.init.survey import survey
from ackd_lightning.data import ImageFolderDataModule, TableDataModule, decoding
from ackd_lightning.data.decoding import load_image
from ackd_lightning.data.labels import read_labels
from ackd_lightning.data.sources import content_mark
from ackd_lightning.deploy.images import list_images
from ackd_lightning.errors import ACKDError
from ackd_lightning.launch.streams import _Unbroken


def photo(path: Path, seed: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def folder(root: Path, counts: dict[str, int], ending: str = "png") -> Path:
    for number, (name, count) in enumerate(counts.items()):
        for each in range(count):
            photo(root / name / f"{each}.{ending}", 100 * number + each)
    return root


def test_a_folder_of_unlabelled_images_beside_the_classes_is_no_class(tmp_path):
    root = folder(tmp_path, {"cat": 10, "dog": 10, "extra": 6})
    data = ImageFolderDataModule(root, unlabelled="extra", cache=False)
    data.setup()
    assert data.class_names == ("cat", "dog")
    assert (data.train_targets < 0).sum() == 6
    assert data.train_targets.max() == 1


@pytest.mark.parametrize("name", ["train", "test"])
@pytest.mark.parametrize("options", [{}, {"train_dir": "."}])
def test_a_class_may_be_named_like_a_part(tmp_path, caplog, name, options):
    root = folder(tmp_path, {"bus": 8, "car": 8, name: 8})
    assert ImageFolderDataModule(root, **options).class_names == tuple(sorted(["bus", "car", name]))
    assert f"named like parts of the data: {name}" in caplog.text


def test_classes_without_images_in_a_part_that_is_split_off_are_named(tmp_path, caplog):
    data = ImageFolderDataModule(folder(tmp_path, {"cat": 40, "dog": 40, "rare": 2, "one": 1}), cache=False)
    data.setup()
    assert "the test set of" in caplog.text
    assert "no images of 2 classes with few images: one, rare" in caplog.text
    assert "the held-out validation part has no images of 2 classes" in caplog.text


def test_equal_files_of_one_class_are_found(tmp_path):
    root = folder(tmp_path, {"cat": 10, "dog": 10})
    (root / "cat" / "0 (1).png").write_bytes((root / "cat" / "0.png").read_bytes())
    found = survey(str(root))
    pairs = {frozenset(each.name for each in pair) for pair in (*found.repeated, *found.shared)}
    assert pairs == {frozenset({"0.png", "0 (1).png"})}


def test_equal_sizes_of_files_without_compression_are_not_equal_images(tmp_path):
    root = folder(tmp_path, {"cat": 4, "dog": 4}, "bmp")
    before = content_mark(ImageFolderDataModule(root).listed()["train"])
    folder(root, {"dog": 4, "cat": 4}, "bmp")  # other pixels, the same sizes
    assert content_mark(ImageFolderDataModule(root).listed()["train"]) != before


def damaged(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def archive() -> bytes:
    handle = io.BytesIO()
    np.savez(handle, a=np.zeros(3))
    return handle.getvalue()


def texts() -> bytes:
    handle = io.BytesIO()
    np.save(handle, np.array([["a", "b"]]))
    return handle.getvalue()


@pytest.mark.parametrize(("make", "reason"), [(archive, "several arrays"), (texts, "<U1")])
def test_what_is_no_array_of_numbers_is_named(tmp_path, make, reason):
    path = damaged(tmp_path / "x.npy", make())
    with pytest.raises(ACKDError, match=rf"x\.npy \(it holds {reason}"):
        load_image(path)


def test_any_failure_of_a_decoder_names_the_file(tmp_path, monkeypatch):
    photo(tmp_path / "x.png", 0)

    def fail(*_):
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ACKDError, match=r"x\.png \(Failed to decode frame 0\): replace"):
        load_image(tmp_path / "x.png")


def test_a_photo_with_too_many_pixels_is_to_be_made_smaller(tmp_path, monkeypatch):
    photo(tmp_path / "x.png", 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ACKDError, match=r"more pixels than Pillow reads safely\): make it smaller"):
        load_image(tmp_path / "x.png")


def test_a_heic_photo_is_known_by_its_content(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(tmp_path / "x.heic")
    path = (tmp_path / "x.heic").rename(tmp_path / "x.jpg")
    assert load_image(path).size == (64, 48)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("turn", range(1, 9))
def test_colours_of_16_bits_are_turned_as_their_camera_states(tmp_path, turn):
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / "8.png", exif=exif)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)), chunk(b"eXIf", exif.tobytes()[6:])]
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    (tmp_path / "16.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert np.array_equal(load_image(tmp_path / "16.png"), np.asarray(load_image(tmp_path / "8.png")))


@pytest.mark.parametrize(("mode", "compression"), [("RGB", None), ("L", "tiff_lzw")])
def test_pages_that_tifffile_cannot_stack_leave_the_first_one(tmp_path, monkeypatch, mode, compression):
    """With the package installed, a file that Pillow reads is not refused for its further pages."""
    pages = [Image.new(mode, (8, 6), value) for value in ("white", "black")]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:], compression=compression)
    found = {"tifffile": True, "imagecodecs": None}
    monkeypatch.setattr(decoding, "find_spec", lambda name: found.get(name))
    image = load_image(tmp_path / "x.tif")
    assert (image.mode, image.size, image.getextrema()[-1] in (255, (255, 255))) == (mode, (8, 6), True)


def test_a_compression_that_needs_a_package_is_told(tmp_path, monkeypatch):
    pytest.importorskip("tifffile")

    def fail(*_):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr("tifffile.TiffFile", fail)
    (tmp_path / "x.tif").write_bytes(b"II*\0")
    with pytest.raises(ACKDError, match="is compressed: pip install imagecodecs"):
        load_image(tmp_path / "x.tif")


def test_a_list_of_images_needs_no_header(tmp_path, caplog):
    for number in range(3):
        photo(tmp_path / f"{number}.png", number)
    table = tmp_path / "list.csv"
    table.write_text("0.png\n1.png\n2.png\n")
    assert [each.name for each in list_images([str(table)])] == ["0.png", "1.png", "2.png"]
    assert "its first line, 0.png, is an image" in caplog.text


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        (["7", "007", "7.0"], None, [7, 7, 7]),
        (["1e2", "10e1", "x"], None, ["1e2", "10e1", "x"]),
        (["0", "A", "9"], ["0", "9", "A"], ["0", "A", "9"]),
        ([1.0, 2.0, float("nan")], None, [1, 2, None]),
        (["", "-1", "nan", "3"], None, [None, None, None, 3]),
    ],
)
def test_labels_are_read_as_they_are_spelled(values, names, expected):
    assert read_labels(values, str, names) == expected


def test_an_image_is_one_however_its_path_is_spelled(tmp_path, caplog):
    for number in range(4):
        photo(tmp_path / f"{number}.png", number)
    (tmp_path / "train.csv").write_text("path,label\n0.png,a\n1.png,b\n2.png,a\n")
    (tmp_path / "test.csv").write_text("path,label\n./0.png,a\n3.png,b\n")
    TableDataModule(tmp_path, train="train.csv", test="test.csv")
    assert "1 image of the test part is in the training part too" in caplog.text


def test_a_few_dark_images_of_16_bits_among_others_are_to_be_converted(tmp_path):
    root = folder(tmp_path, {"cat": 8, "dog": 8})
    Image.fromarray(np.full((16, 16), 2999, dtype=np.uint16)).save(root / "dog" / "zz.png")
    with pytest.raises(ACKDError, match=r"1 of \d+ images .* come out black .*zz\.png\): convert them to 8 bits"):
        ImageFolderDataModule(root, cache=False).setup()


def test_a_name_that_is_no_text_is_printed(tmp_path):
    with (tmp_path / "out").open("w", encoding="utf-8", errors="strict") as file:
        out = _Unbroken(file)
        print("caf\udce9.jpg", file=out, flush=True)
        out.detach()
        assert (tmp_path / "out").read_text() == "caf\\udce9.jpg\n"
