from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from ackd_lightning.data import DigitsDataModule, ImageDataModule, ImageFolderDataModule
from ackd_lightning.data.datasets import FileImages, HeldImages, TensorImages
from ackd_lightning.data.transforms import Keys, crop_flip, normalise
from ackd_lightning.errors import ACKDError
from ackd_lightning.types import Batch

# Lightning and torch comment on this machine: its number of cores, or a GPU that is not used.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:GPU available but not used",
)


def data(folder, **options):
    return ImageFolderDataModule(folder, **{"batch_size": 8, "eval_batch_size": 5, "val_fraction": 0.25, **options})


def epoch(loader, number):
    loader.sampler.set_epoch(number)
    return list(loader)


def test_sizes_and_counts(folder):
    module = data(folder)
    assert module.num_classes == 2
    assert module.class_names == ("cat", "dog")
    module.prepare_data()
    module.setup("fit")
    assert module.num_train_samples == 24
    assert [batch.target.tolist() for batch in module.val_dataloader()] == [[0] * 5, [1] * 3]
    assert [len(batch.target) for batch in module.test_dataloader()] == [5, 3]
    assert [len(batch.target) for batch in module.train_dataloader()] == [8, 8, 8]
    assert not module.val_is_test


@pytest.mark.parametrize(
    ("batch_size", "whole", "sizes"),
    [(10, False, [10, 10, 4]), (10, True, [10, 10]), (23, False, [23]), (25, False, [24])],
)
def test_an_incomplete_batch_is_used_where_it_can_be(folder, caplog, batch_size, whole, sizes):
    module = data(folder, batch_size=batch_size)
    module.whole_batches = whole
    found = [len(each.index) for _ in range(2) for each in epoch(module.train_dataloader(), 0)]
    assert found == sizes * 2
    said = [each for each in caplog.messages if "left out of each epoch" in each]
    assert len(said) == (sum(sizes) < 24)
    assert sum("instead of 25" in each for each in caplog.messages) == (batch_size == 25)
    assert all(f"{24 - sum(sizes)} of 24" in each for each in said)


@pytest.mark.parametrize(
    ("options", "world", "whole"), [({"batch_size": 25}, 1, True), ({"max_per_class": 1}, 2, False)]
)
def test_an_epoch_without_any_batch_is_refused(folder, monkeypatch, options, world, whole):
    module = data(folder, **options)
    module.whole_batches = whole
    monkeypatch.setattr(module, "_world", lambda: (world, 0))
    with pytest.raises(ACKDError):
        module.train_dataloader()


def test_raw_batch_becomes_an_augmented_batch(folder):
    module = data(folder, seed=3)
    raw = epoch(module.train_dataloader(), 4)[0]
    batch = module.on_after_batch_transfer(raw, 0)
    assert type(batch) is Batch
    assert raw.epoch.tolist() == [4] * 8
    augmented = crop_flip(raw, pad=4, flip=True, seed=3)
    assert not torch.equal(augmented, raw.image)
    torch.testing.assert_close(batch.image, normalise(augmented, module.mean, module.std))
    assert torch.equal(batch.index, raw.index)


def test_evaluation_is_not_augmented(folder):
    module = data(folder)
    raw = next(iter(module.val_dataloader()))
    batch = module.on_after_batch_transfer(raw, 0)
    torch.testing.assert_close(batch.image, normalise(raw.image, module.mean, module.std))


def test_other_batches_pass_through(folder):
    module = data(folder)
    for batch in (torch.ones(2), [torch.ones(2)], Batch(torch.ones(2), torch.ones(2), torch.ones(2))):
        assert module.on_after_batch_transfer(batch, 0) is batch


def test_validation_is_the_test_set_when_nothing_is_held_out(folder):
    module = data(folder, val_fraction=0)
    assert module.val_is_test
    val, test = next(iter(module.val_dataloader())), next(iter(module.test_dataloader()))
    assert torch.equal(val.image, test.image)
    assert module.num_train_samples == 32


def test_the_split_does_not_depend_on_the_seed_of_the_run(folder, monkeypatch):
    def parts(**options):
        module = data(folder, **options)
        train = {image.numpy().tobytes() for batch in module.train_dataloader() for image in batch.image}
        val = [image.numpy().tobytes() for batch in module.val_dataloader() for image in batch.image]
        return train, val

    first = parts(seed=0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    torch.manual_seed(5)
    assert parts() == first
    assert not first[0] & set(first[1])


def test_the_seed_orders_the_images_and_comes_from_lightning_by_default(folder, monkeypatch):
    def order(**options):
        return [b.index.tolist() for b in epoch(data(folder, **options).train_dataloader(), 0)]

    assert order() == order(seed=0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert order() == order(seed=17) != order(seed=0)


def test_smaller_training_part_with_the_same_validation(folder):
    whole, part = data(folder), data(folder, train_fraction=0.5, max_per_class=5)
    part.setup()
    assert part.num_train_samples == 9  # 5 of 15 cats (round(7.5) = 8, at most 5) and 4 of 9 dogs
    for a, b in zip(whole.val_dataloader(), part.val_dataloader(), strict=True):
        assert torch.equal(a.image, b.image)
    indices = [i for batch in part.train_dataloader() for i in batch.index.tolist()]
    assert set(indices) < set(range(9))


@pytest.mark.parametrize("size", [32, 72], ids=["in memory", "from files"])
def test_workers_do_not_change_the_batches(folder, size):
    def batches(workers):
        module = data(folder, image_size=size, num_workers=workers)
        torch.manual_seed(workers)
        raw = epoch(module.train_dataloader(), 2) + list(module.val_dataloader())
        return [module.on_after_batch_transfer(batch, 0) for batch in raw]

    for a, b in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_an_image_that_breaks_while_training_is_named_by_a_worker(folder):
    module = data(folder, image_size=72, num_workers=1, val_fraction=0)
    loader = module.train_dataloader()
    (folder / "train" / "cat" / "0003.png").write_bytes(b"gone")
    with pytest.raises(ACKDError, match=r"^could not read the image .*cat/0003\.png") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [16, 72], ids=["in memory", "from files"])
@pytest.mark.parametrize(("count", "shown"), [(2, 1), (3, 2), (9, 5)])
def test_broken_images_are_named_together(folder, size, count, shown):
    for file in sorted((folder / "train" / "cat").iterdir())[1 : 1 + count]:
        file.write_bytes(b"gone")
    with pytest.raises(ACKDError, match=r"0001\.png .*; the same goes for .*0002\.png") as caught:
        data(folder, image_size=size).setup()
    more = str(caught.value).partition("; the same goes for ")[2]
    assert more.count(".png") == shown
    assert ("and others" in more) == (count > 6)


def broken(folder: Path) -> str:
    (folder / "test" / "dog" / "0002.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return r"could not read the image .*test/dog/0002\.png"


def other_classes(folder: Path) -> str:
    (folder / "test" / "dog").rename(folder / "test" / "cow")
    return r"classes that the training part lacks \(cow\)"


def empty_class(folder: Path) -> str:
    (folder / "train" / "cow").mkdir()
    return "train/cow holds no images"


def no_test_images(folder: Path) -> str:
    shutil.rmtree(folder / "test" / "cat")
    shutil.rmtree(folder / "test" / "dog")
    return "test holds neither images nor class folders"


@pytest.mark.parametrize("size", [32, 72], ids=["in memory", "from files"])
@pytest.mark.parametrize("harm", [broken, other_classes, empty_class, no_test_images])
def test_bad_data_are_refused_before_training(folder, harm, size):
    sentence = harm(folder)
    with pytest.raises(ACKDError, match=sentence) as caught:
        data(folder, image_size=size).prepare_data()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"eval_batch_size": -1}, "eval_batch_size is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": 1}, "val_fraction is 1"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"val_fraction": 5000}, "val_fraction is 5000"),
        ({"train_fraction": 1.5}, "train_fraction is 1.5"),
        ({"train_fraction": 0}, "train_fraction is 0"),
        ({"max_per_class": 0}, "max_per_class is 0"),
        ({"val_fraction": 0.01}, "val_fraction 0.01 of 32 labelled images leaves none for validation: make it larger"),
    ],
)
def test_bad_options_are_refused(folder, options, sentence):
    with pytest.raises(ACKDError, match=sentence):
        data(folder, **options).setup()


def test_the_cache_is_made_again_when_an_image_changes(folder, picture, caplog):
    def first_test_image():
        return next(iter(data(folder).test_dataloader())).image[0]

    before = first_test_image()
    assert (folder / "ackd-cache-test-32px.pt").exists()
    assert torch.equal(first_test_image(), before)
    assert not caplog.records
    picture(999).save(folder / "test" / "cat" / "0000.png")
    with caplog.at_level(logging.WARNING):
        after = first_test_image()
    assert "is stale" in caplog.text
    assert not torch.equal(after, before)


def test_no_cache_when_it_is_not_wanted(folder):
    data(folder, cache=False).setup()
    data(folder, cache=False, image_size=72).setup()
    assert sorted(entry.name for entry in folder.iterdir()) == ["test", "train"]


def test_hyperparameters_are_plain_data(folder):
    module = data(Path(folder), mean=(0.1, 0.2, 0.3))
    assert module.hparams["root"] == str(folder)
    assert module.hparams["batch_size"] == 8
    assert module.hparams["mean"] == (0.1, 0.2, 0.3)
    plain = (str, int, float, bool, tuple, type(None))
    assert all(isinstance(value, plain) for value in module.hparams.values())


# ------------------------------------------------------------------------------------------------- with Lightning


class Net(L.LightningModule):
    """A linear classifier that notes what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 16 * 16, 10)
        self.seen = []
        self.evaluated = []

    def training_step(self, batch, batch_idx):
        assert type(batch) is Batch
        pixels = hash(batch.image.cpu().numpy().tobytes())
        self.seen.append((self.current_epoch, batch.index.tolist(), batch.target.tolist(), pixels))
        return torch.nn.functional.cross_entropy(self.layer(batch.image.flatten(1)), batch.target)

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch.index.tolist()

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch.index

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Stop(Callback):
    def __init__(self, batch):
        self.left = batch

    def on_train_batch_start(self, *args):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("killed")


def trainer(*callbacks, **options):
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": bool(callbacks),
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            **options,
        },
        callbacks=list(callbacks),
    )


@pytest.fixture
def hold(monkeypatch):
    """Let the device hold the images; the names of the parts that were copied to it are noted."""
    copied = []

    def switch():
        inner = ImageDataModule._gather
        monkeypatch.setattr(ImageDataModule, "_hold", lambda self, size: True)

        def noting(self, keys):
            before = self._held.get(keys.part)
            batch = inner(self, keys)
            if self._held[keys.part] is not before:
                copied.append(keys.part)
            return batch

        monkeypatch.setattr(ImageDataModule, "_gather", noting)
        return copied

    return switch


def digits(**options):
    return DigitsDataModule(
        **{"batch_size": 32, "max_per_class": 17, "seed": 1, **options}
    )  # 6 batches an epoch, the last one smaller


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the second run saves nothing
@pytest.mark.parametrize(
    ("every", "workers", "held"), [(4, 0, False), (4, 2, False), (6, 2, False), (None, 0, False), (4, 2, True)]
)
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(tmp_path, hold, every, workers, held):
    whole = Net()
    trainer().fit(whole, digits())
    assert len(whole.seen) == 18
    if held:
        hold()
    assert whole.seen[0][1] != whole.seen[6][1]
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=every)
    first = Net()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(saver, Stop(9)).fit(first, digits(num_workers=workers))
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    step = torch.load(last, weights_only=True)["global_step"]
    assert step == {4: 8, 6: 6, None: 6}[every]
    second = Net()
    trainer().fit(second, digits(num_workers=workers), ckpt_path=last)
    assert first.seen[:step] + second.seen == whole.seen


@pytest.mark.parametrize("held", [False, True])
def test_every_stage_runs(hold, held):
    if held:
        hold()
    module, net, run = digits(), Net(), trainer(max_epochs=1)
    run.fit(net, module)
    assert net.evaluated == list(range(126))
    net.evaluated = []
    run.test(net, datamodule=module)
    assert net.evaluated == list(range(539))
    predicted = run.predict(net, datamodule=module)
    assert torch.cat(predicted).tolist() == list(range(539))


@pytest.mark.parametrize("held", [False, True])
def test_overfitting_a_batch_runs(hold, held):
    net = Net()
    if held:
        hold()
    with pytest.warns(UserWarning, match="You requested to overfit"):
        trainer(overfit_batches=1, max_epochs=2).fit(net, digits())
    assert net.seen[0][1:] == net.seen[1][1:]


SCRIPT = """
import sys
from pathlib import Path
import lightning as L
import torch
from ackd_lightning.data import DigitsDataModule

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen, self.evaluated = torch.nn.Linear(768, 10), [], []
    def training_step(self, batch, batch_idx):
        self.seen.append(list(zip(batch.index.tolist(), batch.target.tolist(), batch.image.sum((1, 2, 3)).tolist())))
        return torch.nn.functional.cross_entropy(self.layer(batch.image.flatten(1)), batch.target)
    def validation_step(self, batch, batch_idx):
        self.evaluated += batch.index.tolist()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)
    def on_fit_end(self):
        torch.save({"seen": self.seen, "evaluated": self.evaluated}, Path(sys.argv[1]) / f"{self.global_rank}.pt")

DigitsDataModule._hold = lambda self, size: self.trainer.global_rank == 1  # each process decides on its own
trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, num_sanity_val_steps=0,
                    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
trainer.fit(Net(), DigitsDataModule(batch_size=32, max_per_class=17, seed=1, val_fraction=0.1))
"""


def test_two_processes_share_the_batch_and_repeat_nothing(tmp_path):
    module = digits()
    alone = [module.on_after_batch_transfer(raw, 0) for raw in epoch(module.train_dataloader(), 0)]
    script = tmp_path / "two.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for step in range(5):
        together = ranks[0]["seen"][step] + ranks[1]["seen"][step]
        batch = alone[step]
        sums = batch.image.sum((1, 2, 3)).tolist()
        assert sorted(together) == sorted(zip(batch.index.tolist(), batch.target.tolist(), sums, strict=True))
    assert sorted(ranks[0]["evaluated"] + ranks[1]["evaluated"]) == list(range(126))


class Processes:
    """As much of a trainer as the loaders ask for."""

    def __init__(self, world_size, epoch=0):
        self.world_size, self.global_rank = world_size, 0
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))
        current = SimpleNamespace(processed=epoch)
        self.fit_loop = SimpleNamespace(epoch_progress=SimpleNamespace(current=current))


def test_the_loader_of_a_resumed_run_starts_at_its_epoch():
    module = digits()
    module.trainer = Processes(1, epoch=3)
    assert next(iter(module.train_dataloader())).epoch.tolist() == [3] * 32


def test_a_batch_that_does_not_divide_is_refused():
    module = digits()
    module.trainer = Processes(3)
    with pytest.raises(ACKDError, match="batch_size 32 does not divide by 3 processes"):
        module.train_dataloader()


def test_more_processes_than_images_are_refused(folder):
    module = data(folder)
    module.trainer = Processes(9)
    with pytest.raises(ACKDError, match="the val part holds 8 images for 9 processes"):
        module.val_dataloader()


# ------------------------------------------------------------------------------------- images held by the device


def every_batch(module):
    """All loaders' batches as networks get them, and those of another training epoch."""
    raw = epoch(module.train_dataloader(), 3) + epoch(module.train_dataloader(), 4)
    for loader in (module.val_dataloader(), module.test_dataloader(), module.predict_dataloader()):
        raw += list(loader)
    return raw, [module.on_after_batch_transfer(batch, 0) for batch in raw]


@pytest.mark.parametrize(
    "options", [{}, {"val_fraction": 0}, {"train_fraction": 0.5}, {"num_workers": 2}], ids=lambda each: str(each)
)
def test_held_images_make_the_same_batches(folder, hold, monkeypatch, options):
    usual = every_batch(data(folder, **options))[1]
    monkeypatch.setattr("ackd_lightning.data.loaders._COPY", 7)  # several copies, and an odd one at the end
    copied = hold()
    module = data(folder, **options)
    raw, batches = every_batch(module)
    assert {type(batch) for batch in raw} == {Keys}
    assert copied == ["train", "val", "test"]  # each once
    assert [len(module._held[part][0]) for part in copied] == [len(module._rows[part][1]) for part in copied]
    for mine, theirs in zip(batches, usual, strict=True):
        assert type(mine) is Batch
        assert all(torch.equal(a, b) for a, b in zip(mine[:3], theirs[:3], strict=True))


def test_only_keys_leave_the_loader_of_held_images(folder, hold):
    hold()
    module = data(folder, num_workers=2)
    loader = module.train_dataloader()
    assert (loader.num_workers, loader.pin_memory) == (0, False)
    keys = epoch(loader, 5)[0]
    assert (keys.part, keys.epoch.tolist()) == ("train", [5] * 8)
    assert next(iter(module.test_dataloader())).epoch.tolist() == [-1] * 5


def test_a_run_holds_images_until_it_ends(hold):
    copied = hold()
    net, module = Net(), digits()
    run = trainer(max_epochs=2)
    run.fit(net, module)
    assert copied == ["train", "val"]
    assert module._held == {}
    run.test(net, module)
    assert copied == ["train", "val", "test"]
    assert module._held == {}


def test_held_images_follow_the_device_of_the_batch(folder, hold):
    copied = hold()
    module = data(folder)
    keys = next(iter(module.test_dataloader()))
    module.on_after_batch_transfer(Keys("test", keys.index.to("meta"), keys.epoch), 0)
    assert module._held["test"][0].device.type == "meta"
    here = module.on_after_batch_transfer(keys, 0)
    assert copied == ["test", "test"]
    usual = data(folder)
    assert torch.equal(
        here.image, usual.on_after_batch_transfer(usual._dataset("test").__getitems__([*range(5)]), 0).image
    )


def on_device(name):
    found = Processes(1)
    found.strategy.root_device = torch.device(name)
    return found


def test_a_gpu_holds_what_takes_a_quarter_of_its_free_memory(folder, monkeypatch):
    asked = []
    size = 24 * 3 * 32 * 32
    free = [4 * size]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(str(device)), (free[0], 10**12))[1])
    module = data(folder)
    module.trainer = on_device("cuda:1")
    assert isinstance(module.train_dataloader().dataset, HeldImages)
    assert asked == ["cuda:1"]
    free[0] -= 1
    assert isinstance(module.train_dataloader().dataset, TensorImages)
    assert isinstance(module.val_dataloader().dataset, HeldImages)  # a smaller part


@pytest.mark.parametrize("name", ["cpu", "mps", None])
def test_elsewhere_batches_are_gathered_in_host_memory(folder, monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("asked"))
    module = data(folder, num_workers=1)
    module.trainer = None if name is None else on_device(name)
    loader = module.train_dataloader()
    assert isinstance(loader.dataset, TensorImages)
    assert loader.num_workers == 1


def test_files_are_never_held(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("asked"))
    module = data(folder, image_size=72)
    module.trainer = on_device("cuda")
    assert isinstance(module.train_dataloader().dataset, FileImages)


@pytest.mark.gpu
def test_a_run_on_a_gpu_sees_the_same_either_way(hold, monkeypatch):
    held, sent = Net(), Net()
    copied = hold()
    trainer(accelerator="gpu").fit(held, digits())
    assert copied == ["train", "val"]
    monkeypatch.setattr(ImageDataModule, "_hold", lambda self, size: False)
    trainer(accelerator="gpu").fit(sent, digits())
    assert held.seen == sent.seen
    assert held.evaluated == sent.evaluated


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True), (None, True)])
def test_images_are_pinned_for_the_device_of_the_run(monkeypatch, device, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = DigitsDataModule()
    if device is not None:
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    assert module.pins_memory() is pinned
