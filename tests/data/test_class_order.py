"""`ImageDataModule.use_class_order`: the indices of the classes follow a given order of their names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ackd_lightning.data import CINIC10DataModule, DigitsDataModule, ImageDataModule, ImageFolderDataModule
from ackd_lightning.data.folders import sort_key
from ackd_lightning.data.transforms import Keys
from ackd_lightning.errors import ACKDError
from ackd_lightning.types import DataInfo

REVERSED = ("dog", "cat")


@pytest.fixture(params=[32, 72], ids=["in memory", "from files"])
def make(folder, request):
    def made(**options):
        options = {"batch_size": 8, "eval_batch_size": 5, "val_fraction": 0.25, **options}
        return ImageFolderDataModule(folder, image_size=request.param, **options)

    return made


def loaders(module):
    return [
        module.train_dataloader(),
        module.val_dataloader(),
        module.test_dataloader(),
        module.predict_dataloader(),
    ]


def batches(module, made=None):
    """Every image with its class, as networks get them."""
    out = []
    for loader in made or loaders(module):
        if hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(2)
        out += [module.on_after_batch_transfer(batch, 0) for batch in loader]
    return out


def require_reversed(module, expected, made=None):
    """The same images, splits and order as ``expected``, with the two classes exchanged."""
    assert module.class_names == module.info.class_names == REVERSED
    found = batches(module, made)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.image, theirs.image)
        assert torch.equal(mine.index, theirs.index)
        assert torch.equal(mine.target, 1 - theirs.target)
    assert {int(target) for batch in found for target in batch.target} == {0, 1}
    for batch in found[: module.num_train_samples // module.batch_size]:
        assert torch.equal(module.train_targets[batch.index], batch.target)


def test_info_of_class_folders_is_complete_at_construction(make):
    module = make()
    assert module.info == DataInfo(2, module.input_size, module.mean, module.std, ("cat", "dog"), 3)
    module.setup()
    assert module.info.class_names == ("cat", "dog")


def test_before_setup(make):
    expected = batches(make())
    module = make()
    assert module.use_class_order(list(REVERSED))
    assert module.info.class_names == REVERSED
    module.prepare_data()
    module.setup("fit")
    module.setup("test")
    require_reversed(module, expected)


def test_after_setup(make):
    module = make()
    module.setup("fit")
    expected = batches(module)
    assert module.train_targets.bincount().tolist() == [15, 9]
    assert module.use_class_order(REVERSED)
    assert module.train_targets.bincount().tolist() == [9, 15]
    require_reversed(module, expected)
    module.setup("test")
    module.prepare_data()
    require_reversed(module, expected)


def test_loaders_that_exist_follow(make):
    module = make()
    expected = batches(module)
    made = loaders(module)
    module.use_class_order(REVERSED)
    require_reversed(module, expected, made)


def test_an_order_can_be_given_again_and_changed_back(make):
    module = make()
    assert not module.use_class_order(("cat", "dog"))
    expected = batches(module)
    assert module.use_class_order(REVERSED)
    assert not module.use_class_order(REVERSED)
    assert module.use_class_order(("cat", "dog"))
    for mine, theirs in zip(batches(module), expected, strict=True):
        assert torch.equal(mine.target, theirs.target)
    assert module.class_names == ("cat", "dog")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("protocol", [{"val_fraction": 0}, {"train_fraction": 0.5}, {"num_workers": 2}], ids=str)
def test_every_protocol(make, when, protocol):
    expected = batches(make(**protocol))
    module = make(**protocol)
    if when == "after":
        module.setup()
    module.use_class_order(REVERSED)
    require_reversed(module, expected)


@pytest.mark.parametrize("when", ["before setup", "before the copy", "after the copy"])
def test_images_held_by_the_device(folder, monkeypatch, when):
    def made():
        return ImageFolderDataModule(folder, batch_size=8, eval_batch_size=5, val_fraction=0.25)

    expected = batches(made())
    monkeypatch.setattr(ImageDataModule, "_hold", lambda self, size: True)
    module = made()
    if when == "after the copy":
        batches(module)
        assert set(module._held) == {"train", "val", "test"}
    elif when == "before the copy":
        module.setup()
    module.use_class_order(REVERSED)
    require_reversed(module, expected)


@pytest.mark.gpu
def test_images_held_by_a_gpu(folder):
    module = ImageFolderDataModule(folder, batch_size=8, val_fraction=0.25)
    module.setup()
    keys = torch.arange(8, device="cuda"), torch.full((8,), -1, device="cuda")
    before = module.on_after_batch_transfer(Keys("test", *keys), 0)
    module.use_class_order(REVERSED)
    after = module.on_after_batch_transfer(Keys("test", *keys), 0)
    assert torch.equal(after.target, 1 - before.target)
    assert torch.equal(after.image, before.image)


def test_one_folder_that_is_split(folder):
    def made():
        return ImageFolderDataModule(folder / "train", batch_size=8, val_fraction=0.25)

    expected = batches(made())
    module = made()
    module.use_class_order(REVERSED)
    for mine, theirs in zip(batches(module), expected, strict=True):
        assert torch.equal(mine.image, theirs.image)
        assert torch.equal(mine.target, 1 - theirs.target)


def test_a_validation_part_of_its_own(tmp_path, write_classes):
    for number, part in enumerate(("train", "valid", "test")):
        write_classes(tmp_path / part, {"bird": 10, "ship": 8, "truck": 6}, seed=number * 10_000)
    names = ("truck", "bird", "ship")
    for when in ("before", "after"):
        module = CINIC10DataModule(tmp_path, batch_size=8)
        assert module.class_names == ("bird", "ship", "truck")
        if when == "after":
            module.setup()
        assert module.use_class_order(names)
        module.setup()
        for loader in (module.val_dataloader(), module.test_dataloader()):
            assert torch.cat([batch.target for batch in loader]).bincount().tolist() == [6, 10, 8]
        assert module.train_targets.bincount().tolist() == [6, 10, 8]


def test_the_cache_keeps_the_order_of_the_folders(folder):
    for names in (REVERSED, ("cat", "dog"), REVERSED):
        module = ImageFolderDataModule(folder, batch_size=8)
        module.use_class_order(names)
        module.setup()
        assert module.train_targets.bincount().tolist() == ([11, 18] if names == REVERSED else [18, 11])


class Unnamed(DigitsDataModule):
    """Class names are known only from the data."""

    class_names = None


def test_an_order_that_is_given_while_the_names_are_unknown():
    digits = [str(digit) for digit in np.roll(range(10), 3)]
    usual, module = Unnamed(), Unnamed()
    usual.setup()
    assert module.info.class_names is None
    assert not module.use_class_order(digits)
    module.setup()
    assert module.class_names == tuple(digits)
    assert torch.equal(module.train_targets, (usual.train_targets + 3) % 10)
    assert usual.class_names == tuple("0123456789")
    wrong = Unnamed()
    wrong.use_class_order([*digits[:9], "ten"])
    with pytest.raises(ACKDError, match="'ten'"):
        wrong.setup()


@pytest.mark.parametrize("ready", [False, True])
def test_other_classes_are_refused_and_nothing_changes(make, ready):
    module = make()
    if ready:
        module.setup()
    for names in (["cat", "cow"], ["cat"], ["cat", "dog", "cow"], ["cat", "dog", "dog"], []):
        with pytest.raises(ACKDError) as caught:
            module.use_class_order(names)
        assert "\n" not in str(caught.value)
    assert module.class_names == ("cat", "dog")
    module.setup()
    assert module.train_targets.bincount().tolist() == [15, 9]


def test_names_of_one_number_have_one_order():
    names = ["01", "1", "2", "img1", "img01", "img"]
    found = [sorted(each, key=lambda name: sort_key("natural", name)) for each in (names, names[::-1])]
    assert found[0] == found[1] == ["img", "img01", "img1", "01", "1", "2"]
