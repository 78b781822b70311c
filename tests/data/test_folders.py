"""Folders as people have them: layouts, names of parts and classes, and what lies between the images."""

from __future__ import annotations

import logging
import os
import shutil
import unicodedata

import pytest

from ackd_lightning.data import ImageFolderDataModule, walk
from ackd_lightning.data.folders import class_folders, part_of
from ackd_lightning.errors import ACKDError


def made(root, **options):
    module = ImageFolderDataModule(
        root, **{"image_size": 32, "batch_size": 4, "cache": False, "val_fraction": 0.0, **options}
    )
    module.setup()
    return module


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAIN", "VAL"),
        ("trainset", "testset"),
        ("train_images", "eval_images"),
        ("Training Set", "Validation Set"),
        ("train2017", "val2017"),
        ("trn", "dev"),
    ],
)
def test_parts_are_recognised_by_their_names(folder, train, test):
    (folder / "train").rename(folder / "x")
    (folder / "test").rename(folder / "y")
    (folder / "x").rename(folder / train)
    (folder / "y").rename(folder / test)
    module = made(folder)
    assert module.class_names == ("cat", "dog")
    assert (module.num_train_samples, len(module.test_dataloader().dataset)) == (32, 8)


@pytest.mark.parametrize("name", ["terrier", "testudo", "trainer", "valley", "device"])
def test_classes_are_not_taken_for_parts(name):
    assert part_of(name) is None


def test_a_validation_folder_beside_a_test_folder_is_used(folder, write_classes):
    write_classes(folder / "valid", {"cat": 3, "dog": 2}, seed=90_000)
    module = made(folder, val_fraction=0.1)
    assert len(module.val_dataloader().dataset) == 5
    assert (module.num_train_samples, len(module.test_dataloader().dataset)) == (32, 8)
    assert made(folder).val_is_test


@pytest.mark.parametrize("names", [("train", "Train_2"), ("training", "trainset")])
def test_two_folders_for_one_part(folder, names):
    for name in names:
        if not (folder / name).exists():
            shutil.copytree(folder / "train", folder / name)
    if "train" not in names:
        shutil.rmtree(folder / "train")
        with pytest.raises(ACKDError, match="train_dir"):
            made(folder)
    else:
        assert made(folder).num_train_samples == 32  # the exact name


@pytest.mark.parametrize(
    "names", [("pets_train", "pets_test"), ("2024-train-new", "2024-val-new"), ("train_resized", "holdout_resized")]
)
def test_parts_with_other_words_in_their_names_are_no_classes(folder, names):
    for old, new in zip(("train", "test"), names, strict=True):
        (folder / old).rename(folder / new)
    with pytest.raises(ACKDError, match="train_dir"):
        made(folder)
    assert made(folder, train_dir=names[0], test_dir=names[1]).num_classes == 2


def test_classes_with_the_name_of_one_part_are_classes(tmp_path, write_classes):
    write_classes(tmp_path / "trains", {"freight train": 10, "steam-train": 10})
    assert made(tmp_path / "trains").class_names == ("freight train", "steam-train")


@pytest.mark.parametrize("names", [("more",), ("train2", "Test_new")])
def test_other_folders_beside_the_parts_are_said(folder, names, caplog):
    for name in names:
        shutil.copytree(folder / "train", folder / name)
    with caplog.at_level(logging.WARNING):
        assert made(folder).num_train_samples == 32
    assert all(name in caplog.text for name in names)


@pytest.mark.parametrize(
    ("place", "said"), [("train/0.png", "beside the class folders"), ("train/cat/.0.png", "1 hidden image")]
)
def test_images_that_are_not_read_are_counted(folder, place, said, caplog):
    shutil.copy(folder / "train" / "cat" / "0000.png", folder / place)
    with caplog.at_level(logging.WARNING):
        assert made(folder).num_train_samples == 32
    assert said in caplog.text


@pytest.mark.parametrize("name", ["x.png", "x", "x.txt"])
@pytest.mark.parametrize("target", [None, "/dev/zero"])
def test_pipes_and_devices_are_passed_over_with_a_line(folder, name, target, caplog):
    path = folder / "train" / "cat" / name
    os.mkfifo(path) if target is None else path.symlink_to(target)
    with caplog.at_level(logging.WARNING):
        assert made(folder).num_train_samples == 32
    assert "1 pipe or device" in caplog.text


def test_a_folder_that_cannot_be_read_is_refused(folder, monkeypatch):
    (folder / "train" / "cat" / "private").mkdir()
    scan = os.scandir

    def refusing(path="."):
        if str(path).endswith("private"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ACKDError, match="private"):
        made(folder)


@pytest.mark.parametrize("levels", [("pets",), ("a", "b")])
def test_a_root_that_is_too_high_is_refused_with_the_right_one(folder, levels, tmp_path):
    place = tmp_path.joinpath("high", *levels)
    place.parent.mkdir(parents=True)
    folder.rename(place)
    with pytest.raises(ACKDError, match="set root to"):
        made(tmp_path / "high")


def test_a_single_class_is_refused(tmp_path, write_classes):
    write_classes(tmp_path / "one", {"cat": 20})
    with pytest.raises(ACKDError, match="single class folder, cat"):
        made(tmp_path / "one")
    write_classes(tmp_path / "two" / "photos", {"cat": 5, "dog": 5})
    with pytest.raises(ACKDError, match=r"set root to .*photos"):
        made(tmp_path / "two")


@pytest.mark.parametrize(
    "name",
    [
        ".ipynb_checkpoints",
        ".Trash-1000/files",
        ".thumbnails",
        "@eaDir/x.jpg",
        "__MACOSX",
        "$RECYCLE.BIN",
        "#recycle/a",
        "System Volume Information",
        "@Recycle",
    ],
)
@pytest.mark.parametrize("place", ["train/cat", "train"])
def test_what_systems_leave_behind_is_passed_over_and_said(folder, name, place, caplog):
    (folder / place / name).mkdir(parents=True)
    shutil.copy(folder / "train" / "cat" / "0000.png", folder / place / name / "a.png")
    with caplog.at_level(logging.WARNING):
        module = made(folder)
    assert (module.num_train_samples, module.num_classes) == (32, 2)
    assert name.split("/")[0] in caplog.text


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.JPG", "a.tga", "a.jp2", "photo"])
def test_endings_of_images_are_read(folder, picture, name):
    kind = {"tga": "TGA", "jp2": "JPEG2000"}.get(name.split(".")[-1], "JPEG")
    picture(7).save(folder / "train" / "cat" / name, format=kind)
    assert made(folder).num_train_samples == 33


@pytest.mark.parametrize("name", ["a.heic", "b.raw", "c.pdf", "d"])
def test_files_that_are_not_read_are_counted_and_said(folder, name, caplog, monkeypatch):
    monkeypatch.setattr(walk, "find_spec", lambda package: None)
    (folder / "train" / "dog" / name).write_bytes(b"0123456789")
    with caplog.at_level(logging.WARNING):
        assert made(folder).num_train_samples == 32
    assert name[1:] in caplog.text
    assert "1 file" in caplog.text
    assert ("[heic]" in caplog.text) == (name == "a.heic")


def test_looping_links_are_followed_once(folder, caplog):
    (folder / "train" / "cat" / "again").symlink_to(folder / "train" / "cat")
    (folder / "train" / "dog" / "up").symlink_to(folder / "train" / "dog" / "..")
    with caplog.at_level(logging.WARNING):
        module = made(folder)
    assert len(module.train_targets) < 100
    assert "links" in caplog.text


def test_a_link_to_a_class_is_no_class(folder, caplog, tmp_path, write_classes):
    write_classes(tmp_path / "elsewhere", {"emu": 4})
    names = sorted(each.name for each in (folder / "train").iterdir())
    (folder / "train" / "zzz").symlink_to(names[0], target_is_directory=True)
    for name in ("emu", "emu again"):
        (folder / "train" / name).symlink_to(tmp_path / "elsewhere/emu", target_is_directory=True)
    module = ImageFolderDataModule(folder, batch_size=4)
    module.setup()
    assert sorted(module.class_names) == sorted([*names, "emu"])
    assert "2 links to folders that were read already" in caplog.text


@pytest.mark.parametrize(("link", "to"), [("cat/more", "dog"), ("dog/more", "cat"), ("cat/more", "dog/inner")])
def test_a_link_that_gives_images_a_second_label_is_refused(folder, link, to):
    (folder / "train" / "dog" / "inner").mkdir()
    (folder / "train" / link).symlink_to(folder / "train" / to, target_is_directory=True)
    with pytest.raises(ACKDError, match=f"({link} and .*{to}|{to} and .*{link}) are one folder.*two classes"):
        made(folder)


def test_a_link_to_images_elsewhere_is_followed(folder, tmp_path, write_classes):
    write_classes(tmp_path / "elsewhere", {"more": 4})
    (folder / "train" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more", target_is_directory=True)
    assert made(folder).train_targets.tolist() == [0] * 24 + [1] * 12


@pytest.mark.parametrize("place", ["train/photos", "train/cat/up", "train/cat/inner/up"])
@pytest.mark.parametrize("to", ["train", "."])
def test_a_link_to_a_folder_above_adds_neither_a_class_nor_a_label(folder, place, to, caplog):
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(folder / to, target_is_directory=True)
    module = made(folder)
    assert module.class_names == ("cat", "dog")
    assert module.train_targets.tolist() == [0] * 20 + [1] * 12
    assert "1 link to folders that were read already, or that are above" in caplog.text


def test_a_folder_that_is_reached_by_a_link_to_the_one_above_it_is_read(folder):
    (folder / "train" / "all").symlink_to(".", target_is_directory=True)
    assert len(walk.image_files(folder / "train" / "all")) == 32


def test_names_that_are_composed_differently_are_the_same_class(tmp_path, write_classes):
    name = "caf\u00e9"
    write_classes(tmp_path / "train", {unicodedata.normalize("NFD", name): 6, "bar": 6})
    write_classes(tmp_path / "test", {name: 2, "bar": 2})
    assert made(tmp_path).class_names == ("bar", name)


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_not_utf8(folder):
    image = folder / "train" / "cat" / "0000.png"
    shutil.copy(image, os.fsencode(folder / "train" / "cat") + b"/\xff\xfe.png")
    assert made(folder, cache=True).num_train_samples == 33
    (folder / "train" / "dog").rename(os.fsdecode(os.fsencode(folder / "train") + b"/d\xf6g"))
    with pytest.raises(ACKDError, match="UTF-8"):
        made(folder)


@pytest.mark.parametrize("leave", ["nothing", "an empty folder"])
def test_a_class_that_the_test_part_lacks_is_allowed_and_said(folder, caplog, leave):
    shutil.rmtree(folder / "test" / "cat")
    if leave != "nothing":
        (folder / "test" / "cat").mkdir()
    with caplog.at_level(logging.WARNING):
        module = made(folder)
    targets = [target for batch in module.test_dataloader() for target in batch.target.tolist()]
    assert targets == [1] * 4
    assert module.class_names == ("cat", "dog")
    assert "no images of 1 of the training part's classes: cat" in caplog.text


def test_numbers_as_names(tmp_path, write_classes, caplog):
    write_classes(tmp_path, {str(number): 6 for number in range(1, 13)})
    with caplog.at_level(logging.WARNING):
        assert made(tmp_path).class_names[:3] == ("1", "10", "11")
    assert "class_order" in caplog.text
    assert made(tmp_path, class_order="natural").class_names == tuple(str(number) for number in range(1, 13))
    assert [each.name for each in class_folders(tmp_path, "natural")][:2] == ["1", "2"]


def test_unlabelled_images_join_the_training_part(folder, tmp_path, picture):
    (tmp_path / "more").mkdir()
    for number in range(5):
        picture(7000 + number).save(tmp_path / "more" / f"{number}.jpg")
    module = made(folder, unlabelled=str(tmp_path / "more"), val_fraction=0.2)
    targets = module.train_targets
    assert (targets == -1).sum() == 5
    assert module.use_class_order(["dog", "cat"])
    assert (module.train_targets == -1).sum() == 5
    assert (targets == 0).sum() == (module.train_targets == 1).sum()


@pytest.mark.parametrize("place", ["train/more", "train/more/unl", "train/cat/unl"])
def test_unlabelled_images_below_the_class_folders_are_read_once(folder, place, picture, caplog):
    (folder / place).mkdir(parents=True)
    picture(7000).save(folder / place / "0.png")
    module = made(folder, unlabelled=place)
    assert module.class_names == ("cat", "dog")
    assert sorted(module.train_targets.tolist()) == [-1] + [0] * 20 + [1] * 12
    assert f"no classes of the training part: {place.split('/')[-1]}" in caplog.text


@pytest.mark.parametrize("unlabelled", ["train", "."])
def test_unlabelled_images_that_are_the_training_images_are_refused(folder, unlabelled):
    with pytest.raises(ACKDError, match=r"which holds the training part .*: set it to a folder of further images"):
        made(folder, train_dir="train", unlabelled=unlabelled)


@pytest.mark.parametrize("more", ["more", "train/more"])
def test_unlabelled_images_join_a_flat_training_folder(folder, more, picture):
    shutil.rmtree(folder / "train")
    for place, count in (("train", 4), (more, 6)):
        (folder / place).mkdir()
        for number in range(count):
            picture(number + 10 * count).save(folder / place / f"{number}.png")
    module = made(folder, unlabelled=more)
    assert module.class_names == ("cat", "dog")
    assert module.train_targets.tolist() == [-1] * 10


def test_a_flat_training_folder_has_no_labels(folder, picture):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    for number in range(8):
        picture(number).save(folder / "train" / f"{number}.png")
    module = made(folder)
    assert module.class_names == ("cat", "dog")
    assert module.train_targets.tolist() == [-1] * 8
    with pytest.raises(ACKDError, match="of 0 labelled images leaves none for validation: set it to 0"):
        made(folder, val_fraction=0.5)


def test_lines_about_the_data_do_not_depend_on_the_level_of_other_libraries(folder, caplog):
    (folder / "train" / "dog" / "notes.txt").write_text("")
    logging.getLogger().setLevel(logging.CRITICAL)
    assert made(folder).num_train_samples == 32
    assert ".txt (1)" in caplog.text
