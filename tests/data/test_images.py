from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from ackd_lightning.data.datasets import FileImages, TensorImages, random_crop
from ackd_lightning.data.images import (
    Pixels,
    cached,
    check_files,
    check_image_file,
    decode,
    fingerprint,
    fit_square,
    read_image,
    require_same_classes,
    scan_class_folders,
)
from ackd_lightning.data.sampling import STREAM_TRANSFORM
from ackd_lightning.errors import ACKDError
from ackd_lightning.random import mix


def test_scan_sorts_and_passes_over_other_files(tmp_path, write_classes):
    write_classes(tmp_path, {"b": 2, "a": 3})
    (tmp_path / "b" / "notes.txt").write_text("x")
    (tmp_path / "b" / "._0000.png").write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "readme.md").write_text("x")
    write_classes(tmp_path, {"a/images": 1}, suffix=".JPEG")
    files = scan_class_folders(tmp_path)
    assert files.class_names == ("a", "b")
    assert files.targets.tolist() == [0, 0, 0, 0, 1, 1]
    assert [p.relative_to(tmp_path).as_posix() for p in files.paths[2:5]] == [
        "a/0002.png",
        "a/images/0000.JPEG",
        "b/0000.png",
    ]
    assert scan_class_folders(tmp_path, keep=["b"]).targets.tolist() == [0, 0]


def missing(root, write_classes):
    return "there is no folder"


def empty(root, write_classes):
    root.mkdir()
    return "neither images nor class folders"


def flat(root, write_classes):
    write_classes(root.parent, {root.name: 3})
    return "holds 3 images but no class folders"


def empty_class(root, write_classes):
    write_classes(root, {"a": 1})
    (root / "b").mkdir()
    return "set/b holds no images: put some there or delete"


@pytest.mark.parametrize("make", [missing, empty, flat, empty_class])
def test_scan_says_what_is_wrong(tmp_path, write_classes, make):
    sentence = make(tmp_path / "set", write_classes)
    with pytest.raises(ACKDError, match=sentence) as caught:
        scan_class_folders(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_different_classes_are_named():
    require_same_classes(["a", "b"], ["a", "b"], "train", "test")
    with pytest.raises(ACKDError, match=r"only in train: b; only in test: c, d, e and 1 more"):
        require_same_classes(["a", "b"], ["a", "c", "d", "e", "f"], "train", "test")


def grey(path):
    Image.fromarray(np.full((4, 4), 77, np.uint8)).save(path)
    return (77, 77, 77)


def sixteen_bit(path):
    Image.fromarray(np.full((4, 4), 77 * 256 + 200, np.uint16)).save(path)
    return (77, 77, 77)


def palette(path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(path, transparency=b"\xff\x80")
    return (10, 20, 30)


def with_alpha(path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 128)).save(path)
    return (10, 20, 30)


def one_bit(path):
    Image.new("1", (4, 4), 1).save(path)
    return (255, 255, 255)


@pytest.mark.parametrize("make", [grey, sixteen_bit, palette, with_alpha, one_bit])
def test_every_mode_becomes_rgb(tmp_path, make):
    colour = make(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == colour


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    red, green, blue = read_image(tmp_path / "x.jpg").getpixel((4, 4))
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


@pytest.mark.parametrize("look", [read_image, check_image_file])
@pytest.mark.parametrize("break_file", [truncated_jpeg, truncated_png, no_image, no_bytes])
def test_a_broken_image_is_named(tmp_path, picture, break_file, look):
    path = tmp_path / "bad.jpg"
    break_file(path, picture)
    with pytest.raises(
        ACKDError, match=r"could not read the image .*bad\.jpg .*replace the file or delete it"
    ) as caught:
        look(path)
    assert "\n" not in str(caught.value)


def test_an_image_with_bytes_after_its_end_is_good(tmp_path, picture):
    picture(0, 64).save(tmp_path / "x.jpg")
    with (tmp_path / "x.jpg").open("ab") as file:
        file.write(b"\0" * 100)
    check_image_file(tmp_path / "x.jpg")


def test_fit_square_resizes_the_shorter_side_and_cuts_the_centre(picture):
    image = picture(0, 32)
    assert fit_square(image, 32) is image
    wide = Image.new("RGB", (80, 40))
    wide.paste((255, 0, 0), (20, 0, 60, 40))
    square = fit_square(wide, 20)
    assert square.size == (20, 20)
    assert square.getpixel((10, 10)) == (255, 0, 0)


def test_decode_keeps_order_and_pixels(tmp_path, write_classes, picture):
    write_classes(tmp_path, {"a": 3, "b": 2}, size=16)
    pixels = decode(scan_class_folders(tmp_path), 16)
    assert pixels.images.shape == (5, 3, 16, 16)
    for position, seed in enumerate([0, 1, 2, 1000, 1001]):
        expected = torch.from_numpy(np.array(picture(seed, 16))).permute(2, 0, 1)
        assert torch.equal(pixels.images[position], expected)


def test_fingerprint_sees_names_sizes_times_and_settings(tmp_path, write_classes):
    write_classes(tmp_path, {"a": 2})
    paths = [tmp_path / "a" / "0000.png", tmp_path / "a" / "0001.png"]
    marks = [fingerprint(paths, tmp_path, 32), fingerprint(paths, tmp_path, 16), fingerprint(paths[:1], tmp_path, 32)]
    assert fingerprint(paths, tmp_path, 32) == marks[0]
    os.utime(paths[1], ns=(1, 1))
    marks.append(fingerprint(paths, tmp_path, 32))
    paths[1].write_bytes(b"0")
    os.utime(paths[1], ns=(1, 1))
    marks.append(fingerprint(paths, tmp_path, 32))
    assert len(set(marks)) == 5


def pixels(value):
    return Pixels(("a",), torch.full((2, 3, 4, 4), value, dtype=torch.uint8), torch.tensor([0, 0]))


def test_cache_is_used_while_it_is_fresh_and_never_when_it_is_stale(tmp_path, caplog):
    path = tmp_path / "cache.pt"
    made = cached(path, "one", lambda: pixels(1))
    again = cached(path, "one", lambda: pytest.fail("decoded again"))
    assert torch.equal(made.images, again.images)
    assert again.class_names == ("a",)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert cached(path, "two", lambda: pixels(2)).images.unique().tolist() == [2]
    assert "is stale" in caplog.text
    assert cached(path, "two", lambda: pytest.fail("decoded again")).images.unique().tolist() == [2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.pt"]


def test_a_damaged_cache_is_made_again(tmp_path, caplog):
    path = tmp_path / "cache.pt"
    cached(path, "one", lambda: pixels(1))
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert cached(path, "one", lambda: pixels(3)).images.unique().tolist() == [3]
    assert "cannot be read" in caplog.text


def test_a_cache_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    path = tmp_path / "cache.pt"
    torch.save({"fingerprint": "one", "images": Bomb()}, path)
    assert cached(path, "one", lambda: pixels(3)).images.unique().tolist() == [3]
    assert not (tmp_path / "owned").exists()


def test_without_a_writable_folder_it_goes_on_with_one_warning(tmp_path):
    with pytest.warns(UserWarning, match="could not write the cache") as caught:
        result = cached(tmp_path / "nowhere" / "cache.pt", "one", lambda: pixels(1))
    assert len(caught) == 1
    assert result.images.unique().tolist() == [1]


def test_files_are_checked_once(tmp_path, write_classes):
    write_classes(tmp_path / "a", {"x": 3})
    files = scan_class_folders(tmp_path / "a")
    check_files(files, tmp_path / "checked.pt")
    broken = files.paths[1]
    before = broken.stat()
    broken.write_bytes(b"0" * before.st_size)
    os.utime(broken, ns=(before.st_atime_ns, before.st_mtime_ns))
    check_files(files, tmp_path / "checked.pt")  # size and time as before: not looked at again
    os.utime(broken)
    with pytest.raises(ACKDError, match=r"0001\.png"):
        check_files(files, tmp_path / "checked.pt")


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


def test_random_crops_are_spread_like_those_of_torchvision():
    width, height, count = 90, 60, 3000
    mine = [random_crop(width, height, seed) for seed in range(count)]
    transform = v2.RandomResizedCrop(1)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    theirs = [transform.make_params([torch.zeros(3, height, width)]) for _ in range(count)]
    torch.set_rng_state(state)

    def described(left, top, wide, tall):
        share, ratio = wide * tall / (width * height), (wide / tall).log()
        return torch.stack([share, ratio, left / (width - wide + 1), top / (height - tall + 1)], dim=1)

    boxes = torch.tensor([box for box, _ in mine]).double()
    drawn = torch.tensor([[each[key] for key in ("left", "top", "width", "height")] for each in theirs]).double()
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double()
    crops = described(boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    quantiles = [torch.quantile(each, levels, dim=0) for each in (crops, described(*drawn.T))]
    torch.testing.assert_close(*quantiles, rtol=0, atol=0.04)
    assert abs(sum(mirror for _, mirror in mine) / count - 0.5) < 0.03
    assert [*boxes.amin(dim=0)[:2].tolist(), *boxes.amax(dim=0)[2:].tolist()] == [0, 0, width, height]


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1, 1), (0, 0, 1, 1)),
        ((1000, 1), (499, 0, 500, 1)),
        ((9, 1000), (0, 494, 9, 506)),
        ((1000, 9), (494, 0, 506, 9)),
    ],
)
def test_random_crop_of_an_image_that_no_crop_fits_is_its_centre(size, box):
    assert {random_crop(*size, seed)[0] for seed in range(5)} == {box}


@pytest.fixture
def file_images(tmp_path, write_classes):
    write_classes(tmp_path, {"a": 4}, size=(60, 40))
    files = scan_class_folders(tmp_path)
    return FileImages(files.paths, files.targets, torch.tensor([3, 1]), size=28, seed=7)


def test_file_images_are_keyed_and_leave_the_generator_alone(file_images):
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
    dataset = FileImages(files.paths, files.targets, torch.arange(12).flip(0), size=28, seed=7)
    batch = dataset.__getitems__([(2, index) for index in range(12)])
    mirrored = 0
    for index, image in enumerate(batch.image):
        box, mirror = random_crop(60, 40, mix(7, 2, index, STREAM_TRANSFORM))
        cut = read_image(files.paths[11 - index]).crop(box).resize((28, 28), Image.Resampling.BILINEAR)
        expected = np.array(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else cut).transpose(2, 0, 1)
        apart = np.abs(image.numpy().astype(int) - expected)
        assert apart.max() <= 1  # torch and PIL round differently
        mirrored += mirror
    assert 0 < mirrored < 12
    assert batch.image.is_contiguous()


def test_file_images_evaluate_the_centre(file_images):
    path = os.fsdecode(bytes(file_images.paths[3]))
    with Image.open(path) as image:
        resized = image.resize((48, 32), Image.Resampling.BILINEAR).crop((10, 2, 38, 30))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    assert torch.equal(file_images.__getitems__([0]).image[0], expected)


def test_cache_file_is_left_whole_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "cache.pt"
    cached(path, "one", lambda: pixels(1))

    def full(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.warns(UserWarning, match="No space left"):
        cached(path, "two", lambda: pixels(2))
    monkeypatch.undo()
    assert cached(path, "one", lambda: pytest.fail("lost")).images.unique().tolist() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.pt"]
