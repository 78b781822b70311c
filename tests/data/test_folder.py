from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest
import torch

from ackd_lightning.data import ImageFolderDataModule
from ackd_lightning.data.datasets import FileImages, TensorImages
from ackd_lightning.errors import ACKDError


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_test_folder_is_found_by_its_name(folder, name):
    (folder / "test").rename(folder / name)
    module = ImageFolderDataModule(folder, batch_size=8)
    assert sum(len(batch.target) for batch in module.test_dataloader()) == 8


def test_folders_by_name(folder):
    (folder / "train").rename(folder / "a")
    (folder / "test").rename(folder / "b")
    module = ImageFolderDataModule(folder, train_dir="a", test_dir="b", batch_size=8)
    module.setup()
    assert module.num_train_samples == 32 - 2 - 1


def test_one_folder_of_class_folders_is_split(folder):
    module = ImageFolderDataModule(folder / "train", batch_size=8, val_fraction=0.25)
    assert module.num_classes == 2
    test = torch.cat([batch.image for batch in module.test_dataloader()])
    targets = torch.cat([batch.target for batch in module.test_dataloader()])
    assert targets.bincount().tolist() == [4, 2]  # a fifth of 20 and 12
    val = torch.cat([batch.image for batch in module.val_dataloader()])
    train = torch.cat([batch.image for batch in module.train_dataloader()])
    assert len(val) == 4 + 2  # a quarter of the remaining 16 and 10
    images = [image.numpy().tobytes() for part in (train, val, test) for image in part]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize(("parts", "said"), [(("train",), "6 images"), (("train", "val"), "validation part")])
def test_a_test_set_that_is_taken_from_another_part_is_said(folder, parts, said, caplog):
    (folder / "test").rename(folder / "val")
    module = ImageFolderDataModule(folder if "val" in parts else folder / "train", batch_size=8)
    module.setup()
    assert sum("has no test part" in line and said in line for line in caplog.messages) == 1


@pytest.mark.parametrize(
    ("share", "said"), [(0.0, "no training image is held out"), (0.25, "are held out to validate")]
)
def test_what_is_held_out_beside_a_validation_part_as_the_test_set(folder, share, said, caplog):
    (folder / "test").rename(folder / "val")
    ImageFolderDataModule(folder, batch_size=8, val_fraction=share).setup()
    assert said in caplog.text


def test_class_folders_named_like_parts_of_another_layout(folder):
    (folder / "train").rename(folder / "other")
    with pytest.raises(ACKDError, match="holds the folder test but no folder train"):
        ImageFolderDataModule(folder)


@pytest.mark.parametrize("options", [{}, {"test_dir": "test"}, {"test_dir": "sets/test"}])
@pytest.mark.parametrize("other", [None, "test2"])
def test_parts_beside_the_class_folders_are_no_classes(folder, options, other, caplog):
    root = folder / "train"
    place = root / options.get("test_dir", "test")
    place.parent.mkdir(exist_ok=True)
    (folder / "test").rename(place)
    if other and options:
        shutil.copytree(place, root / other)
    with pytest.raises(ACKDError, match=r"set train_dir to \. where the class folders are"):
        ImageFolderDataModule(root, **options)
    module = ImageFolderDataModule(root, train_dir=".", batch_size=8, val_fraction=0, **options)
    assert module.class_names == ("cat", "dog")
    assert len(module.test_dataloader().dataset) == 8
    assert module.num_train_samples == 32
    assert "no classes of the training part: test" in caplog.text
    assert not (other and options) or other in caplog.text


def test_a_flat_training_folder_does_not_hold_the_test_images(folder, picture):
    shutil.rmtree(folder / "train")
    for number in range(5):
        picture(number).save(folder / f"{number}.png")
    module = ImageFolderDataModule(folder, train_dir=".", batch_size=4, val_fraction=0)
    module.setup()
    assert module.class_names == ("cat", "dog")
    assert module.num_train_samples == 5


def test_size_decides_where_images_live(folder):
    small = ImageFolderDataModule(folder, image_size=64, batch_size=8)
    large = ImageFolderDataModule(folder, image_size=65, batch_size=8)
    assert isinstance(small.train_dataloader().dataset, TensorImages)
    assert isinstance(large.train_dataloader().dataset, FileImages)
    assert next(iter(small.train_dataloader())).image.shape == (8, 3, 64, 64)
    batch = next(iter(large.train_dataloader()))
    assert batch.image.shape == (8, 3, 65, 65)
    # a worker has augmented it: the module only normalises
    done = large.on_after_batch_transfer(batch, 0).image
    back = done * torch.tensor(large.std)[:, None, None] + torch.tensor(large.mean)[:, None, None]
    torch.testing.assert_close(back, batch.image.float() / 255)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"root": "nowhere"}, "there is no folder .*nowhere"),
        ({"train_dir": "tran"}, "there is no folder .*tran: .* holds test, train"),
        ({"test_dir": "tst"}, "there is no folder .*tst"),
        ({"image_size": 4}, "image_size is 4"),
        ({"std": (0.1, 0.0, 0.1)}, r"std is \(0.1, 0.0, 0.1\)"),
        ({"mean": (0.1,)}, "mean has 1 values"),
        ({"image_size": 5000}, "image_size is 5000"),
        ({"std": (0.1, 0.1)}, "std has 2 values"),
    ],
)
def test_bad_arguments(folder, options, sentence):
    root = folder / options.pop("root", ".")
    with pytest.raises(ACKDError, match=sentence):
        ImageFolderDataModule(root, **options)


def test_a_folder_without_class_folders(tmp_path, write_classes):
    write_classes(tmp_path, {"images": 2})
    with pytest.raises(ACKDError, match="holds 2 images but no class folders"):
        ImageFolderDataModule(tmp_path / "images")


@pytest.mark.parametrize("size", [32, 72], ids=["in memory", "files"])
def test_the_mark_of_the_images_is_theirs_and_not_their_place(folder, picture, tmp_path, size):
    def mark(root, **options):
        module = ImageFolderDataModule(root, image_size=size, cache=False, **options)
        module.setup()
        return module.content_mark("train")

    shutil.copytree(folder, tmp_path / "copy")
    before = mark(folder)
    assert mark(tmp_path / "copy") == before
    assert mark(folder, value_range=(0, 200)) != before
    first = min((folder / "train").rglob("*.png"))
    if size > 64:
        first.rename(first.with_name("0000-other.png"))
    else:
        picture(12345).save(first)
    assert mark(folder) != before


def test_photos_that_were_trained_on_and_are_tested_now_are_said(folder, caplog):
    def made():
        module = ImageFolderDataModule(folder / "train", batch_size=4)
        module.setup()
        return module

    before = made()
    marks = before.part_marks
    assert {part: count for part, (count, _) in marks.items()} == {
        part: len(before.image_names(part)) for part in ("train", "val", "test")
    }
    made().say_changed(marks)
    assert "have changed" not in caplog.text
    for name in before.image_names("test")[:3]:  # of the first class
        (folder / "train" / name).unlink()
    after = made()
    assert set(after.image_names("test")) & set(before.image_names("train"))
    after.say_changed(marks)
    count = len(after.image_names("test"))
    assert f"test part: {marks['test'][0]} then, {count} now" in caplog.text
    assert "some images that it has learned from may be in another part now" in caplog.text


@pytest.mark.parametrize("val_fraction", [0.2, 0.0])
def test_a_photo_that_is_added_moves_at_most_one_other(folder, picture, val_fraction):
    def parts() -> dict[str, str]:
        module = ImageFolderDataModule(folder / "train", batch_size=4, val_fraction=val_fraction)
        module.setup()
        return {name: part for part in ("train", "test", "val") for name in module.image_names(part)}

    before = parts()
    first = min(before)
    picture(99).save(folder / "train" / Path(first).parent / "0000-added.png")  # before all others in the list
    after = parts()
    assert len(after) == len(before) + 1
    moved = [name for name, part in before.items() if after[name] != part]
    assert len(moved) <= (1 if val_fraction == 0 else 2)  # one by each of both splits
    assert len([name for name in after if name not in before]) == 1


def test_one_folder_for_two_parts_is_said(folder, caplog):
    ImageFolderDataModule(folder, test_dir="train", batch_size=8)
    assert f"the test part is the training part: both are {folder / 'train'}" in caplog.messages


def test_no_part_that_measures_accuracy_is_trained_on_without_labels(folder, caplog):
    for place in ("test", "test/cat", folder / "test"):
        with pytest.raises(ACKDError, match="which belongs to the test part"):
            ImageFolderDataModule(folder, test_dir="test", unlabelled=str(place))
    (folder / "pool").mkdir()
    (folder / "test").rename(folder / "pool/test")
    shutil.copytree(folder / "train/cat", folder / "pool/more")
    module = ImageFolderDataModule(folder, test_dir="pool/test", unlabelled="pool", val_fraction=0)
    module.setup()
    assert "test part" in caplog.text
    assert "is left out of the unlabelled images" in caplog.text
    tested = set(module.image_names("test"))
    assert len(tested) == 8
    assert len(module.image_names("train")) == 32 + 20
    assert not any("pool/test" in name for name in module.image_names("train"))


def test_a_share_that_has_no_effect_is_said(folder, caplog):
    shutil.copytree(folder / "test", folder / "val")
    ImageFolderDataModule(folder, val_fraction=0.5).setup()
    assert "val_fraction 0.5 has no effect" in caplog.text
    caplog.clear()
    for share in (0.1, 0):
        ImageFolderDataModule(folder, val_fraction=share).setup()
    assert "has no effect" not in caplog.text


def test_the_test_set_does_not_depend_on_how_a_system_spells_names(folder, tmp_path):
    chosen = []
    for number, form in enumerate(("NFC", "NFD")):
        root = tmp_path / str(number)
        picture_file = next((folder / "train/cat").iterdir())
        for name in ("H\N{LATIN SMALL LETTER A WITH DIAERESIS}user", "Wald"):
            (root / unicodedata.normalize(form, name)).mkdir(parents=True)
            for image in range(20):
                shutil.copy(picture_file, root / unicodedata.normalize(form, name) / f"{image}.png")
        module = ImageFolderDataModule(root)
        module.setup()
        chosen.append(sorted(unicodedata.normalize("NFC", name) for name in module.image_names("test")))
    assert chosen[0] == chosen[1]
