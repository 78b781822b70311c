from __future__ import annotations

import pytest
import torch

from ackd_lightning.data.folders import scan_class_folders
from ackd_lightning.data.path_table import PathTable
from ackd_lightning.data.sources import (
    Files,
    Pixels,
    new_positions,
    reorder,
    require_same_classes,
)
from ackd_lightning.errors import ACKDError


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
    assert [p.relative_to(tmp_path).as_posix() for p in list(files.paths)[2:5]] == [
        "a/0002.png",
        "a/images/0000.JPEG",
        "b/0000.png",
    ]
    assert scan_class_folders(tmp_path, classes=["b"], others="skip").targets.tolist() == [0, 0]


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
    return "set/b holds no images"


@pytest.mark.parametrize("make", [missing, empty, flat, empty_class])
def test_scan_refuses_another_layout(tmp_path, write_classes, make):
    sentence = make(tmp_path / "set", write_classes)
    with pytest.raises(ACKDError, match=sentence) as caught:
        scan_class_folders(tmp_path / "set")
    assert "\n" not in str(caught.value)


def test_different_classes_are_named():
    require_same_classes(["a", "b"], ["a", "b"], "train", "test")
    with pytest.raises(ACKDError, match=r"only in train: b; only in test: c, d, e and 1 more"):
        require_same_classes(["a", "b"], ["a", "c", "d", "e", "f"], "train", "test")


def test_positions_in_another_order():
    assert new_positions(["a", "b", "c"], ["c", "a", "b"]).tolist() == [1, 2, 0]
    assert new_positions(["a", "b"], ("a", "b")).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("order", "named", "unnamed"),
    [
        (["a", "b"], ["'c'"], []),
        (["a", "b", "c", "d"], ["'d'"], []),
        (["a", "b", "b"], ["'b'", "'c'"], []),
        (["v", "w", "x", "y", "z"], ["'v'", "'w'", "'a'", "5 more"], ["'x'", "'b'"]),
    ],
)
def test_other_classes_are_refused_and_up_to_three_are_named(order, named, unnamed):
    with pytest.raises(ACKDError) as caught:
        new_positions(["a", "b", "c"], order)
    sentence = str(caught.value)
    assert all(name in sentence for name in named)
    assert not any(name in sentence for name in unnamed)
    assert "\n" not in sentence


def test_reordering_keeps_images_and_the_name_of_each_class(tmp_path):
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    pixels = Pixels(("a", "b", "c"), images, torch.tensor([0, 2, 1, 0]))
    files = Files(tmp_path, pixels.class_names, PathTable(tmp_path, list("0123")), pixels.targets)
    for source in (pixels, files):
        other = reorder(source, ["c", "b", "a"])
        assert [other.class_names[t] for t in other.targets] == ["a", "c", "b", "a"]
        assert source.targets.tolist() == [0, 2, 1, 0]
    assert reorder(pixels, ["c", "b", "a"]).images is images
    assert reorder(pixels, pixels.class_names).targets is not pixels.targets


def test_some_of_the_files(tmp_path):
    files = Files(tmp_path, ("a", "b"), PathTable(tmp_path, list("012")), torch.tensor([0, 1, 1]))
    some = files.select(torch.tensor([2, 0]))
    assert [path.name for path in some.paths] == ["2", "0"]
    assert some.targets.tolist() == [1, 0]
    assert (some.names, len(some), some.file(-1)) == (("2", "0"), 2, tmp_path / "0")
    with pytest.raises(IndexError):
        some.file(2)


def test_a_path_outside_the_root_stays_whole(tmp_path):
    """``..`` after a linked folder is another place than ``..`` in its name."""
    (tmp_path / "real/shards").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real/shards")
    (tmp_path / "image.png").write_bytes(b"x")
    table = PathTable.of_paths(tmp_path / "link", [tmp_path / "image.png", tmp_path / "link/inside.png"])
    assert [table[0], table[1]] == [tmp_path / "image.png", tmp_path / "link/inside.png"]
    assert table[0].read_bytes() == b"x"
