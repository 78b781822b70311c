from __future__ import annotations

import pytest
import torch

from ackd_lightning.data import Augmentation, ImageFolderDataModule
from ackd_lightning.data.augmentation import ImageAugmentation, Mixing, seeded
from ackd_lightning.data.sampling import EpochSampler, balanced
from ackd_lightning.errors import ACKDError
from ackd_lightning.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:GPU available but not used")
ALL = {
    "policy": {"policy": "randaugment"},
    "trivial": {"policy": "trivialaugment", "erasing": 0.5},
    "erasing": {"erasing": 1.0},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "both": {"policy": "randaugment", "erasing": 0.25, "mixup": 0.2, "cutmix": 1.0},
}
EVERY = pytest.mark.parametrize("options", ALL.values(), ids=ALL)
SIZES = pytest.mark.parametrize("size", [32, 72], ids=["in memory", "from files"])


def data(folder, **options):
    return ImageFolderDataModule(folder, **{"batch_size": 8, "eval_batch_size": 5, "val_fraction": 0.25, **options})


def batches(module, epoch=0, start=0):
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batches": start})
    return [module.on_after_batch_transfer(batch, 0) for batch in loader]


def same(first, second):
    pairs = zip(first, second, strict=True)
    return all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


@SIZES
@EVERY
def test_an_epoch_depends_on_seed_and_epoch_alone(folder, options, size):
    made = {"augmentation": Augmentation(**options), "image_size": size, "seed": 3}
    torch.manual_seed(1)
    usual = batches(data(folder, **made), epoch=2)
    torch.manual_seed(2)
    again = batches(data(folder, **made), epoch=2)
    resumed = batches(data(folder, **made), epoch=2, start=1)
    assert all(map(same, usual, again))
    assert all(map(same, usual[1:], resumed))
    plain = batches(data(folder, **{**made, "augmentation": None}), epoch=2)
    assert not torch.equal(usual[0].image, plain[0].image)
    for other in ({"seed": 4}, {}):
        others = batches(data(folder, **{**made, **other}), epoch=2 if other else 3)
        assert not torch.equal(usual[0].image, others[0].image)


@SIZES
def test_workers_do_not_change_an_augmented_batch(folder, size):
    made = {"augmentation": Augmentation(**ALL["both"]), "image_size": size}
    usual, theirs = (batches(data(folder, **made, num_workers=workers), epoch=1) for workers in (0, 2))
    assert all(map(same, usual, theirs))


@EVERY
def test_evaluation_is_not_augmented(folder, options):
    plain, made = data(folder), data(folder, augmentation=Augmentation(**options))
    for loader in ("val_dataloader", "test_dataloader"):
        pairs = zip(getattr(plain, loader)(), getattr(made, loader)(), strict=True)
        assert all(same(plain.on_after_batch_transfer(a, 0), made.on_after_batch_transfer(b, 0)) for a, b in pairs)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_the_shares_of_the_pixels(kind):
    image = torch.stack([torch.full((3, 16, 16), float(value)) for value in range(4)])
    batch = Batch(image, torch.tensor([0, 1, 2, 3]), torch.arange(4))
    mixing = Mixing(Augmentation(**{kind: 1.0}), 5, seed=0)
    mixed = [mixing(batch, (0, number)) for number in range(20)]
    for each in mixed:
        assert torch.allclose(each.soft.sum(dim=1), torch.ones(4))
        shares = each.soft @ torch.arange(5.0)  # the mean pixel is the mean class
        assert torch.allclose(each.image.mean(dim=(1, 2, 3)), shares, atol=1e-5)
        assert torch.equal(each.target, each.soft.argmax(dim=1))
    assert len({round(float(each.soft[1, 1]), 4) for each in mixed}) > 5


def test_with_mixup_and_cutmix_a_batch_gets_one_of_them():
    image = torch.stack([torch.full((3, 16, 16), float(value)) for value in range(4)])
    batch = Batch(image, torch.arange(4), torch.arange(4))
    mixing = Mixing(Augmentation(mixup=1.0, cutmix=1.0), 4, seed=0)
    pasted = [len(mixing(batch, (0, number)).image[1].unique()) == 2 for number in range(60)]
    assert 15 < sum(pasted) < 45


def test_erasing_leaves_the_mean_colour():
    change = ImageAugmentation(Augmentation(erasing=1.0), (0.2, 0.4, 0.6), seed=0)
    image = change(torch.zeros(3, 32, 32, dtype=torch.uint8), 0, 0)
    assert image.flatten(1).amax(dim=1).tolist() == [51, 102, 153]
    change = ImageAugmentation(Augmentation(erasing=1.0), (0.2, 0.4, 0.6), seed=0, deep=True)
    image = change(torch.zeros(3, 32, 32), 0, 0)
    assert image.flatten(1).amax(dim=1).tolist() == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize("channels", [2, 4])
def test_a_policy_needs_colours(channels):
    with pytest.raises(ACKDError, match=str(channels)):
        ImageAugmentation(Augmentation(policy="randaugment"), (0.5,) * channels, seed=0)
    ImageAugmentation(Augmentation(erasing=0.1), (0.5,) * channels, seed=0)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"policy": "randaug"}, "policy"),
        ({"mixup": -0.1}, "mixup"),
        ({"erasing": 1.5}, "erasing"),
        ({"magnitude": 31}, "magnitude"),
        ({"operations": 0}, "operations"),
        ({"cutmix": float("nan")}, "cutmix"),
    ],
)
def test_bad_values_are_refused(wrong, name):
    with pytest.raises(ACKDError, match=name):
        Augmentation(**wrong)


def test_hyperparameters_are_plain_data(folder):
    module = data(folder, augmentation=Augmentation(mixup=0.2))
    stored = dict(module.hparams)
    assert stored["augmentation"]["mixup"] == 0.2
    assert ImageFolderDataModule(**stored).augmentation == Augmentation(mixup=0.2)


def test_seeded_restores_the_generator_after_an_error():
    def draw():
        with seeded(3):
            torch.rand(1)
            raise ValueError(torch.rand(1))

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="tensor"):
        draw()
    assert torch.equal(torch.get_rng_state(), before)


TARGETS = torch.tensor([0] * 20 + [1] * 3 + [2] * 9)


def keys(epoch=0, start=0, world=1, rank=0):
    sampler = EpochSampler(TARGETS, num_replicas=world, rank=rank, seed=5, balance=TARGETS)
    sampler.set_epoch(epoch)
    sampler.resume_at(epoch, start)
    return list(sampler)


def test_balanced_epochs_have_every_class_equally_often():
    chosen, repeats = balanced(TARGETS, 7, torch.arange(len(TARGETS)))
    counts = torch.bincount(TARGETS[chosen]).tolist()
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == len(TARGETS)
    for label in range(3):
        times = torch.bincount(chosen[TARGETS[chosen] == label], minlength=len(TARGETS))[label == TARGETS]
        assert int(times.max() - times.min()) <= 1
    assert len(set(zip(chosen.tolist(), repeats.tolist(), strict=True))) == len(TARGETS)  # no view twice


def test_balanced_epochs_resume_and_divide_among_processes():
    whole = keys(epoch=4)
    assert keys(epoch=4, start=10) == whole[10:]
    assert [keys(4, world=2, rank=rank) for rank in (0, 1)] == [whole[0::2], whole[1::2]]
    assert keys(epoch=5) != whole


def test_a_repeated_image_gets_another_view(folder):
    module = data(folder, sampling="balanced", val_fraction=0, batch_size=32)
    (batch,) = batches(module)
    for index in batch.index.unique():
        views = batch.image[batch.index == index]
        assert len(views.flatten(1).unique(dim=0)) >= len(views) - 1  # two of 162 crops may coincide
    assert torch.bincount(batch.target).tolist() == [16, 16]
