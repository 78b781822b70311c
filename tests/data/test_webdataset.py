from __future__ import annotations

import contextlib
import errno
import io
import tarfile

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ackd_lightning import CE, DistillationModule
from ackd_lightning.callbacks.answers import TestAnswers
from ackd_lightning.data import WebDatasetDataModule, webdataset
from ackd_lightning.data.shards import expand
from ackd_lightning.deploy.checking import images_of
from ackd_lightning.deploy.report.measuring import measure
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods import CRD, FitInfo

pytest.importorskip("webdataset")


def write_shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path, picture):
    """Four training shards of 10, 10, 10 and 6 images, two test shards of 5."""

    def samples(start, count):
        for number in range(start, start + count):
            buffer = io.BytesIO()
            picture(number, (40, 36)).save(buffer, format="PNG")
            yield f"{number:04d}.png", buffer.getvalue()
            yield f"{number:04d}.cls", str(number % 3).encode()

    for shard, count in enumerate((10, 10, 10, 6)):
        write_shard(tmp_path / f"train-{shard}.tar", samples(10 * shard, count))
    for shard in range(2):
        write_shard(tmp_path / f"test-{shard}.tar", samples(100 + 5 * shard, 5))
    return tmp_path


def made(root, **options):
    settings = {"train": "train-{0..3}.tar", "test": "test-*.tar", "num_classes": 3, "val_fraction": 0, "seed": 3}
    module = WebDatasetDataModule(root, **{**settings, "batch_size": 4, "image_size": 16, "buffer": 8, **options})
    module.prepare_data()
    module.setup()
    return module


def epoch(module, number=0, state=None):
    loader = module.train_dataloader()
    loader.set_epoch(number)
    if state is not None:
        loader.load_state_dict({**loader.state_dict(), **state})
    return list(loader)


def same(first, second):
    return all(torch.equal(one.image, other.image) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [16, (24, 20), 72])
def test_an_epoch_reads_every_image_once_in_an_order_of_seed_and_epoch(shards, size):
    module = made(shards, image_size=size)
    first, second = epoch(module, 0), epoch(module, 1)
    assert len(first) == 9
    index = torch.cat([batch.index for batch in first])
    assert len(index.unique()) == 36
    assert not torch.equal(index, torch.cat([batch.index for batch in second]))
    assert same(first, epoch(made(shards, image_size=size), 0))
    assert not same(first, epoch(made(shards, image_size=size, seed=4), 0))
    done = module.on_after_batch_transfer(first[0], 0)
    assert done.image.shape == (4, *module.info.image_shape)
    assert done.index.tolist() == [-1] * 4


def test_images_that_fill_no_batch_are_left_out_with_a_line(shards, caplog):
    module = made(shards, batch_size=5)
    for _ in range(2):
        assert [len(batch.index) for batch in epoch(module)] == [5] * 7
    assert [each for each in caplog.messages if "1 of 36" in each] == caplog.messages


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_exactly(shards, workers):
    module = made(shards, num_workers=workers)
    whole = epoch(module)
    for done in (1, 4):
        assert same(epoch(module, 0, {"epoch": 0, "batches": done}), whole[done:])


@pytest.mark.parametrize(
    ("name", "options"),
    [("data.num_workers", {"num_workers": 2}), ("data.batch_size", {"batch_size": 2}), ("data.buffer", {"buffer": 0})],
)
def test_an_epoch_cannot_go_on_in_another_order(shards, name, options):
    begun = made(shards).train_dataloader()
    states = [begun.state_dict() for _ in begun]
    loader = made(shards, **options).train_dataloader()
    loader.set_epoch(1)  # the next epoch may differ
    loader.load_state_dict(states[0])
    loader.set_epoch(0)
    with pytest.raises(ACKDError, match=rf"after batch 1 of epoch 1 .*{name} was"):
        loader.load_state_dict(states[0])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_read_shards_of_their_own_and_equally_many_batches(shards, world, monkeypatch):
    parts, tests = [], []
    for rank in range(world):
        module = made(shards)
        monkeypatch.setattr(module, "_world", lambda rank=rank: (world, rank))
        parts.append(epoch(module))
        tests += [int(target) for batch in module.test_dataloader() for target in batch.index] if world == 2 else []
    assert {len(part) for part in parts} == {9}
    seen = [set(torch.cat([batch.index for batch in part]).tolist()) for part in parts]
    assert not seen[0] & seen[1]
    assert len(tests) == len(set(tests)) == (10 if world == 2 else 0)


@pytest.mark.parametrize("buffer", [0, 8])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_has_every_image_once_however_shards_processes_and_workers_divide(
    shards, world, workers, buffer, monkeypatch
):
    seen = []
    for rank in range(world):
        module = made(shards, num_workers=workers, batch_size=3, buffer=buffer)
        monkeypatch.setattr(module, "_world", lambda rank=rank: (world, rank))
        seen += [int(index) for batch in epoch(module, 1) for index in batch.index]
        assert same(epoch(module, 1, {"epoch": 1, "batches": 5}), epoch(module, 1)[5:])
    assert len(seen) == len(set(seen)) == 36


def test_images_of_one_name_in_two_shards_are_two(shards, picture):
    (shards / "train-1.tar").write_bytes((shards / "train-0.tar").read_bytes())
    index = torch.cat([batch.index for batch in epoch(made(shards))])
    assert len(index.unique()) == 36


def test_every_shard_is_read_once_before_the_first_step(shards, monkeypatch):
    read = []
    check = webdataset._check_shard
    monkeypatch.setattr(webdataset, "_check_shard", lambda path, *rest: (read.append(path.name), check(path, *rest))[1])
    made(shards, cache=False).train_dataloader()
    assert len(read) == len(set(read)) == 6


def test_shards_that_have_lost_images_since_are_named(shards):
    module = made(shards)
    (shards / "train-0.tar").write_bytes((shards / "train-3.tar").read_bytes())
    with pytest.raises(ACKDError, match="hold fewer images than when they were counted"):
        epoch(module)


def test_answers_do_not_depend_on_workers_and_batches(shards):
    found = []
    for workers, size in ((0, 10), (0, 3), (2, 3)):
        torch.manual_seed(0)
        data = made(shards, num_workers=workers, eval_batch_size=size)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
        answers = TestAnswers()
        trainer = L.Trainer(
            accelerator="cpu", logger=False, callbacks=[answers], enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.test(DistillationModule(network, method=CE(), data=data.info), data, verbose=False)
        found.append(answers.answers)
    assert found[0] is not None
    assert {each.images for each in found} == {found[0].images}
    assert all(torch.equal(each.prediction, found[0].prediction) for each in found)
    assert len(found[0].prediction.unique()) > 1


def test_evaluation_reads_every_image_once_with_any_number_of_workers(shards):
    for workers in (0, 2):
        module = made(shards, num_workers=workers, eval_batch_size=3)
        targets = torch.cat([batch.target for batch in module.test_dataloader()])
        assert targets.bincount().tolist() == [3, 4, 3]


class SaveAt(L.Callback):
    """Write a checkpoint after a step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_fit_is_resumed_in_the_middle_of_an_epoch(shards, tmp_path):
    def fit(resume=None):
        torch.manual_seed(0)
        data = made(shards)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
        module = DistillationModule(network, method=CE(), data=data.info, seed=1)
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, callbacks=[SaveAt(13, tmp_path / "half.ckpt")],
            enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=resume)
        assert trainer.global_step == 18
        return network[1].weight.detach().clone()

    whole = fit()
    assert torch.equal(fit(tmp_path / "half.ckpt"), whole)


def test_methods_with_memories_by_index_are_refused(shards):
    data = made(shards)
    module = DistillationModule("resnet8", teacher=None, method=CE(), data=data.info)
    assert module.data.num_classes == 3
    fit = FitInfo(targets=getattr(data, "train_targets", None))
    with pytest.raises(ACKDError, match="CRD"):
        CRD().begin_fit(fit)


def test_the_number_of_images_belongs_to_the_shards_of_each_part(shards):
    for train, test, images in (("train-{0..2}.tar", "train-3.tar", 30), ("train-0.tar", "train-{1..3}.tar", 10)):
        assert made(shards, train=train, test=test).num_train_samples == images


def test_files_of_an_image_stand_beside_each_other(shards, picture):
    buffer = io.BytesIO()
    picture(0, (40, 36)).save(buffer, format="PNG")
    image, label = buffer.getvalue(), b"0"
    write_shard(shards / "train-0.tar", [("a.png", image), ("a.cls", label), ("b.png", image), ("b.cls", label)] * 2)
    module = made(shards, train="train-0.tar", test="train-0.tar")
    assert module.num_train_samples == sum(len(batch.target) for batch in module.test_dataloader()) == 4
    write_shard(shards / "train-0.tar", [("a.png", image), ("b.png", image), ("a.cls", label), ("b.cls", label)])
    with pytest.raises(ACKDError, match=r"a in .* no file \.cls .* with the files of each image next to each other"):
        made(shards, train="train-0.tar")
    write_shard(shards / "train-0.tar", [("a.png", image), ("a.cls", label)] * 2)
    with pytest.raises(ACKDError, match=r"a in .* two files \.png: write the shard again, with a name of its own"):
        made(shards, train="train-0.tar")


def test_an_ending_of_labels_may_have_capitals(shards, picture):
    buffer = io.BytesIO()
    picture(0, (40, 36)).save(buffer, format="PNG")
    files = ((".PNG", buffer.getvalue()), (".CLS", b"1"))
    samples = [(f"{number}{ending}", content) for number in range(4) for ending, content in files]
    write_shard(shards / "train-0.tar", samples)
    assert made(shards, train="train-0.tar", test="train-0.tar", label_key="CLS").num_train_samples == 4


def test_names_of_classes_and_their_order(shards):
    module = made(shards, num_classes=None, class_names=["a", "b", "c"])
    before = torch.cat([batch.target for batch in module.test_dataloader()])
    assert module.use_class_order(["c", "a", "b"])
    after = torch.cat([batch.target for batch in module.test_dataloader()])
    assert torch.equal(after, torch.tensor([1, 2, 0])[before])


@pytest.mark.parametrize("options", [{"policy": "trivialaugment"}, {"erasing": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("size", [16, 72])
def test_augmentation_is_a_function_of_seed_epoch_and_key(shards, options, size):
    module, again, plain = (made(shards, image_size=size, augmentation=each) for each in (options, options, {}))
    first, second, without = (
        [each.on_after_batch_transfer(batch, 0) for batch in epoch(each, 1)] for each in (module, again, plain)
    )
    assert same(first, second)
    assert not same(first, without)
    assert (first[0].soft is not None) == ("mixup" in options)
    assert same(epoch(module, 1, {"epoch": 1, "batches": 3}), epoch(again, 1)[3:])


def test_images_of_16_bits_keep_them(tmp_path):
    rows = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 60
    for name, start in (("train-0.tar", 0), ("test-0.tar", 8)):
        samples = []
        for number in range(start, start + 8):
            buffer = io.BytesIO()
            np.save(buffer, rows)
            samples += [(f"{number}.npy", buffer.getvalue()), (f"{number}.cls", str(number % 3).encode())]
        write_shard(tmp_path / name, samples)
    options = {"channels": 1, "train": "train-0.tar", "image_size": 32, "augmentation": {"erasing": 1.0}}
    image = epoch(made(tmp_path, **options))[0].image
    assert image.dtype == torch.float32
    assert len(image.unique()) > 256
    assert image.max() <= 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([4095] * 8, r"8, such as .*train-0\.tar, 0\.npy\) have no value above 4,095 .* value_range to \[0, 4095\]"),
        ([4095] * 7 + ["8 bits"], "7 of 8 images in .* have 16 bits, use at most 12"),
        ([60000] * 7 + ["8 bits"], None),
    ],
)
def test_deep_images_that_would_be_black_are_refused_as_in_folders(tmp_path, values, said, caplog):
    for part, start in (("train", 0), ("test", 4)):
        samples = []
        for number in range(start, start + 4):
            buffer, top = io.BytesIO(), values[number]
            np.save(buffer, np.full((32, 32), 200, "uint8") if top == "8 bits" else np.full((32, 32), top, "uint16"))
            samples += [(f"{number}.npy", buffer.getvalue()), (f"{number}.cls", str(number % 2).encode())]
        write_shard(tmp_path / f"{part}-0.tar", samples)
    options = {"channels": 1, "train": "train-0.tar", "image_size": 32, "batch_size": 2, "cache": True}
    if said:
        with pytest.raises(ACKDError, match=said):
            made(tmp_path, **options).prepare_data()
        if values[-1] == 4095:
            made(tmp_path, **options, value_range=[0, 4095]).prepare_data()
            with pytest.raises(ACKDError, match=said):
                made(tmp_path, **options).prepare_data()
        return
    for _ in range(2):  # read, and from the cache
        caplog.clear()
        made(tmp_path, **options).prepare_data()
        assert "1 of 8 images" in caplog.text


def cut(path):
    path.write_bytes(path.read_bytes()[:9000])


def no_tar(path):
    path.write_bytes(b"not a tar file" * 100)


def nothing(path):
    path.write_bytes(b"")


def other_label(path):
    write_shard(path, [("a.png", b"x"), ("a.cls", b"cat")])


def label_too_large(path):
    write_shard(path, [("a.png", b"x"), ("a.cls", b"3")])


def no_label(path):
    write_shard(path, [("a.png", b"x")])


def no_image(path):
    write_shard(path, [("a.cls", b"1")])


@pytest.mark.parametrize("harm", [cut, no_tar, nothing, other_label, label_too_large, no_label, no_image])
@pytest.mark.parametrize("shard", ["train-2.tar", "test-0.tar"])
def test_bad_shards_are_named_before_training(shards, harm, shard):
    harm(shards / shard)
    with pytest.raises(ACKDError, match=shard) as caught:
        made(shards)
    assert "\n" not in str(caught.value)


def test_a_damaged_image_is_named_by_shard_and_file(shards):
    write_shard(shards / "train-0.tar", [("a.png", b"no image"), ("a.cls", b"0"), ("b.png", b"x"), ("b.cls", b"1")])
    expected = r"image .*/train-0\.tar, [ab]\.png \(its content is no image that Pillow knows\): replace"
    with pytest.raises(ACKDError, match=expected):
        epoch(made(shards, train="train-0.tar", batch_size=2))


def test_a_shard_that_may_not_be_read_is_named(shards, monkeypatch):
    def refused(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(webdataset, "_first_is_deep", lambda *_: False)
    monkeypatch.setattr(tarfile, "open", refused)
    with pytest.raises(ACKDError, match=r"train-0\.tar may not be read or written .*: change its permissions"):
        made(shards)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train": "tran-*.tar"}, "tran-"),
        ({"train": "train-{0..5}.tar"}, r"train-4\.tar"),
        ({"train": "{train,none}-*.tar"}, r"missing, the first is .*none-\*\.tar"),
        ({"train": "{train-*,train-0}.tar"}, r"name .*train-0\.tar more than once"),
        ({"train": "train-{0,0,1}.tar"}, r"name .*train-0\.tar more than once"),
        ({"train": "https://example.org/{0..5}.tar"}, "https"),
        ({"train": "pipe:cat x.tar"}, "pipe"),
        ({"val_fraction": 1.0}, "val is None"),
        ({"val": "test-0.tar", "val_fraction": 0.5}, "val_fraction is 0.5"),
        ({"num_classes": None}, "num_classes"),
        ({"num_classes": 4, "class_names": ["a", "b"]}, "num_classes is 4"),
        ({"num_classes": None, "class_names": ["0", "2", "1"]}, "label 2 of the shards in .* may be the class named"),
        ({"max_per_class": 3}, "max_per_class"),
        ({"sampling": "balanced"}, "balanced"),
        ({"batch_size": 64}, "36 images"),
    ],
)
def test_bad_arguments(shards, options, named):
    with pytest.raises(ACKDError, match=named):
        made(shards, **options)


def test_brackets_in_names_are_those_of_files_that_exist(shards):
    (shards / "[püß] 100% {a}").mkdir()
    for name in ("x[1].tar", "[püß] 100% {a}/train-5.tar"):
        (shards / name).write_bytes((shards / "train-0.tar").read_bytes())
    assert made(shards, train="{train-0,x[1]}.tar").num_train_samples == 20
    for pattern in (
        "train-*.tar",
        f"{shards}/[[]püß] 100% {{a}}/train-5.tar",
        f"{shards}/[püß] 100% {{a}}/train-*.tar",
    ):
        names = [path.name for path in expand(shards / "[püß] 100% {a}", pattern)]
        assert names == ["train-5.tar"]
    assert [path.name for path in expand(shards, "train-[01].tar")] == ["train-0.tar", "train-1.tar"]


def test_more_processes_than_shards_and_predictions_are_refused(shards, monkeypatch):
    module = made(shards)
    with pytest.raises(ACKDError, match="index"):
        module.predict_dataloader()
    monkeypatch.setattr(module, "_world", lambda: (3, 0))
    with pytest.raises(ACKDError, match="2 shards for 3 processes"):
        module.setup()


@pytest.mark.parametrize(("types", "refused"), [("uint8 uint16", True), ("uint16 uint8", False)])
def test_an_image_of_more_bits_than_the_first_is_refused(tmp_path, types, refused):
    for part in ("train", "test"):
        samples = []
        for number in range(4):
            buffer = io.BytesIO()
            kind = types.split()[number > 0]
            np.save(buffer, np.full((32, 32), 200 if kind == "uint8" else 60000, kind))
            samples += [(f"{number}.npy", buffer.getvalue()), (f"{number}.cls", str(number % 2).encode())]
        write_shard(tmp_path / f"{part}-0.tar", samples)
    module = made(tmp_path, channels=1, train="train-0.tar", image_size=32, batch_size=2)
    with pytest.raises(ACKDError, match="more than 8 bits") if refused else contextlib.nullcontext():
        assert len(epoch(module)) == 2


def test_a_report_and_a_check_read_shards(shards):
    module = made(shards)
    found = measure(module, lambda image: {"student": image.mean(dim=(2, 3))}, torch.device("cpu"))
    assert len(found.target) == 10
    assert found.names is None
    images = images_of(module)  # without a validation part, of the test set
    assert (images.part, images.words) == ("test", "10 test images of WebDataset")


def test_training_shards_among_the_test_shards_are_said(shards, caplog):
    made(shards, test="t*-0.tar")
    assert "1 shard of the test part is in the training part too, such as train-0.tar" in caplog.messages


def test_of_two_images_in_a_sample_one_is_named(tmp_path, picture):
    for part in ("train", "test"):
        samples = []
        for number in range(4):
            grey = np.full((32, 32), 40000, np.uint16)
            for ending, values in (("depth.png", grey), ("PNG", np.asarray(picture(number)))):
                buffer = io.BytesIO()
                Image.fromarray(values).save(buffer, format="PNG")
                samples.append((f"{number}.{ending}", buffer.getvalue()))
            samples.append((f"{number}.cls", str(number % 2).encode()))
        write_shard(tmp_path / f"{part}-0.tar", samples)
    options = {"train": "train-0.tar", "num_classes": 2, "image_size": 32, "batch_size": 4}
    with pytest.raises(ACKDError, match=r"0 in .*has the images depth\.png and png: set image_key"):
        epoch(made(tmp_path, **options))
    with pytest.raises(ACKDError, match=r"0 in .*has no file with its image"):
        epoch(made(tmp_path, image_key="mask", **options))
    (batch,) = epoch(made(tmp_path, image_key=".png", **options))
    assert batch.image.dtype == torch.uint8
    expected = {picture(number).tobytes() for number in range(4)}
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in batch.image} == expected
    (deep,) = epoch(made(tmp_path, image_key="depth.png", **options))
    assert deep.image.dtype == torch.float32


def test_small_images_are_cropped_as_without_a_policy(shards):
    """A policy moves the crop from the device into the process, and leaves it what it is."""
    plain, changed = (made(shards, augmentation=each) for each in ({}, {"erasing": 1e-9}))
    assert same(*([each.on_after_batch_transfer(batch, 0) for batch in epoch(each, 1)] for each in (plain, changed)))


def test_validation_shards_that_are_not_read_are_said(shards, caplog):
    made(shards, val="test-0.tar", test="test-1.tar", val_fraction=0)
    assert "the validation part of the data is not read" in caplog.text
