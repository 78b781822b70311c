from __future__ import annotations

import io
import shutil

import pytest
import torch
from PIL import Image

from ackd_lightning.data import HuggingFaceDataModule
from ackd_lightning.errors import ACKDError

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def table(picture):
    def make(count, *, labels=("cat", "dog"), start=0, image="image", label="label"):
        encoded = []
        for number in range(count):
            buffer = io.BytesIO()
            picture(start + number).save(buffer, format="PNG")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        kind = datasets.ClassLabel(names=list(labels)) if isinstance(labels[0], str) else datasets.Value("int64")
        targets = [
            number % len(labels) if isinstance(labels[0], str) else labels[number % len(labels)]
            for number in range(count)
        ]
        features = datasets.Features({image: datasets.Image(), label: kind})
        return datasets.Dataset.from_dict({image: encoded, label: targets}, features=features)

    return make


def made(root, **options):
    module = HuggingFaceDataModule(root, **{"batch_size": 4, "val_fraction": 0.0, **options})
    module.setup()
    return module


@pytest.mark.parametrize("size", [32, 72], ids=["in memory", "from files"])
@pytest.mark.parametrize("workers", [0, 2])
def test_splits_and_class_names(tmp_path, table, size, workers):
    parts = {"train": table(12), "validation": table(6, start=100), "test": table(4, start=200)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    module = made(tmp_path / "set", image_size=size, val_fraction=0.1, num_workers=workers if size > 64 else 0)
    assert module.class_names == ("cat", "dog")
    assert module.train_targets.tolist() == [0, 1] * 6
    assert len(module.val_dataloader().dataset) == 6
    batches = [module.on_after_batch_transfer(batch, 0) for batch in module.train_dataloader()]
    assert all(batch.image.shape == (4, 3, size, size) for batch in batches)
    again = made(tmp_path / "set", image_size=size, val_fraction=0.1)
    for one, other in zip(batches, again.train_dataloader(), strict=True):
        assert torch.equal(one.image, again.on_after_batch_transfer(other, 0).image)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_splits_that_number_their_classes_in_another_way(tmp_path, table, part):
    parts = {"train": table(12, labels=("ant", "bee", "cow")), "test": table(6, labels=("ant", "bee", "cow"))}
    parts[part] = table(6, labels=("cow", "ant"))
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    module = made(tmp_path / "set", val_fraction=0.2)
    loader = module.val_dataloader() if part == "validation" else module.test_dataloader()
    targets = torch.cat([module.on_after_batch_transfer(batch, 0).target for batch in loader])
    assert [module.class_names[target] for target in targets] == ["cow", "ant"] * 3
    parts[part] = table(6, labels=("cow", "dog"))
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "other")
    named = "val" if part == "validation" else part
    with pytest.raises(ACKDError, match=rf"'dog' in row 1 of the {named} split of .* is not one of the training"):
        made(tmp_path / "other")


@pytest.mark.parametrize(
    ("image", "label", "labels", "names"),
    [("img", "fine_label", ("a", "b", "c"), ("a", "b", "c")), ("pixels", "labels", (3, 7), ("3", "7"))],
)
def test_one_dataset_with_other_columns(tmp_path, table, image, label, labels, names):
    table(20, labels=labels, image=image, label=label).save_to_disk(tmp_path / "set")
    module = made(tmp_path / "set")
    assert module.class_names == names
    assert module.num_train_samples + len(module.test_dataloader().dataset) == 20


def two_images(table):
    first = table(8)
    return first.add_column("other", first["label"]).rename_column("other", "x"), {"image_column": "no"}, "'no'"


def no_labels(table):
    return table(8, labels=(0, 1), label="y"), {}, "set label_column"


def text_for_images(table):
    return datasets.Dataset.from_dict({"image": ["x"] * 8, "label": [0, 1] * 4}), {}, "0 columns of images"


@pytest.mark.parametrize("make", [two_images, no_labels, text_for_images])
def test_columns_that_are_missing(tmp_path, table, make):
    dataset, options, named = make(table)
    dataset.save_to_disk(tmp_path / "set")
    with pytest.raises(ACKDError, match=named):
        made(tmp_path / "set", **options)


def test_a_broken_image_is_named_by_its_row(tmp_path, table):
    content = [{"bytes": b"no image", "path": None}] * 8
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"image": content, "label": [0, 1] * 4}, features=features).save_to_disk(
        tmp_path / "set"
    )
    with pytest.raises(ACKDError, match="row 0"):
        made(tmp_path / "set")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_folders_that_are_no_datasets(tmp_path, make):
    make(tmp_path / "set")
    with pytest.raises(ACKDError, match="save_to_disk"):
        made(tmp_path / "set")


@pytest.mark.parametrize("size", [32, 72], ids=["in memory", "from files"])
def test_another_column_is_read_anew(tmp_path, table, size):
    first = table(10)
    features = datasets.Features({**first.features, "masked": datasets.Image()})
    other = [each["image"] for each in table(10, start=500).cast_column("image", datasets.Image(decode=False))]
    columns = {name: first.cast_column("image", datasets.Image(decode=False))[name] for name in ("image", "label")}
    datasets.Dataset.from_dict({**columns, "masked": other}, features=features).save_to_disk(tmp_path / "set")
    both = [made(tmp_path / "set", image_column=name, image_size=size) for name in ("image", "masked")]
    images, masked = (torch.cat([batch.image for batch in each.test_dataloader()]) for each in both)
    assert images.shape == masked.shape
    assert not torch.equal(images, masked)


def test_splits_that_are_not_read_are_said(tmp_path, table, caplog):
    parts = {"train": table(12), "test": table(4, start=200), "extra": table(4, start=300), "testing": table(4)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    made(tmp_path / "set")
    assert f"splits of {tmp_path / 'set'} that are not read: extra, testing" in caplog.messages


def test_names_with_digits_are_those_of_their_positions(tmp_path, table):
    parts = {"train": table(12, labels=("0", "2", "1")), "test": table(6, labels=("0", "2", "1"))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    module = made(tmp_path / "set")
    assert (module.class_names, module.train_targets.tolist()) == (("0", "2", "1"), [0, 1, 2] * 4)


def test_a_split_without_rows_is_named(tmp_path, table):
    datasets.DatasetDict({"train": table(8), "test": table(8).select([])}).save_to_disk(tmp_path / "set")
    with pytest.raises(ACKDError, match="test has no rows: save one with rows, or leave it out"):
        made(tmp_path / "set")


def test_a_class_without_training_images_is_said(tmp_path, table, caplog):
    every = table(12, labels=("z", "a", "m"))
    every.select([row for row in range(12) if row % 3 != 1]).save_to_disk(tmp_path / "set")
    assert made(tmp_path / "set").num_classes == 3
    assert f"no training image of {tmp_path / 'set'} has the class a" in caplog.messages


def test_names_that_the_test_split_alone_has_are_said(tmp_path, table, caplog):
    parts = {"train": table(12, labels=(0, 1, 2)), "test": table(6, labels=("a", "m", "z"))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert made(tmp_path / "set").class_names == ("0", "1", "2")
    assert any("names (a, m, z)" in line and "equal numbers" in line for line in caplog.messages)


def test_a_column_with_several_images_in_a_row_is_refused(tmp_path, table):
    image = table(1).cast_column("image", datasets.Image(decode=False))["image"][0]
    kinds = {"image": datasets.Sequence(datasets.Image()), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {"image": [[image, image]] * 8, "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(tmp_path / "set")
    with pytest.raises(ACKDError, match=r"column 'image' of .* does not hold one image in each row.*set image_column"):
        made(tmp_path / "set", image_column="image")


def test_images_that_were_replaced_under_their_old_paths_are_read_again(tmp_path, picture):
    """The library's fingerprint is that of the table of paths, into which the images are embedded later."""
    photos, root = tmp_path / "photos", tmp_path / "set"
    photos.mkdir()
    for level in (10, 200):
        for number in range(10):
            Image.new("RGB", (32, 32), (level,) * 3).save(photos / f"{number}.png")
        paths = [str(photos / f"{number}.png") for number in range(10)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = datasets.Dataset.from_dict({"image": paths, "label": [0, 1] * 5}, features=features)
        shutil.rmtree(root / "data", ignore_errors=True)
        rows.save_to_disk(root)
        module = made(root, cache=True)
        source, _ = module._part("train")
        assert source.images.float().mean() == level


def test_a_set_that_was_saved_in_another_order_is_said(tmp_path, table, caplog):
    rows = table(60)
    rows.save_to_disk(tmp_path / "set")
    rows.save_to_disk(tmp_path / "copy")
    before = made(tmp_path / "set", val_fraction=0.1)
    same = made(tmp_path / "copy", val_fraction=0.1)
    assert before.part_marks == same.part_marks
    assert before.content_mark("train") == same.content_mark("train")
    rows.shuffle(seed=1).save_to_disk(tmp_path / "other")
    caplog.clear()
    same.say_changed(before.part_marks)
    assert not caplog.messages
    made(tmp_path / "other", val_fraction=0.1).say_changed(before.part_marks)
    assert "some images that it has learned from may be in another part now" in caplog.text
