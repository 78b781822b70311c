from __future__ import annotations

import pytest
import torch

from ackd_lightning.data.sampling import (
    EpochSampler,
    ResumableLoader,
    as_is,
    stratified_split,
    subset,
)
from ackd_lightning.errors import ACKDError
from ackd_lightning.random import mix

TARGETS = torch.tensor([0] * 40 + [1] * 25 + [2] * 1 + [4] * 10)[torch.randperm(76, generator=torch.manual_seed(1))]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.9, 0.99])
def test_split_takes_the_rounded_share_of_each_class(fraction):
    train, val = stratified_split(TARGETS, fraction)
    for label, count in ((0, 40), (1, 25), (2, 1), (4, 10)):
        held_out = min(round(fraction * count), count - 1)
        assert (TARGETS[val] == label).sum() == held_out
        assert (TARGETS[train] == label).sum() == count - held_out
    assert sorted(train.tolist() + val.tolist()) == list(range(76))
    assert train.tolist() == sorted(train.tolist())
    assert val.tolist() == sorted(val.tolist())


def test_split_equals_a_slow_reference():
    chosen = []
    for label in (0, 1, 2, 4):
        mine = [i for i, t in enumerate(TARGETS.tolist()) if t == label]
        mine.sort(key=lambda i: mix(3, i, 101))
        chosen += mine[: round(0.25 * len(mine))]
    assert stratified_split(TARGETS, 0.25, split_seed=3)[1].tolist() == sorted(chosen)


def test_split_depends_on_the_split_seed_and_not_on_the_global_generator():
    torch.manual_seed(1)
    first = stratified_split(TARGETS, 0.25)[1]
    torch.manual_seed(2)
    assert torch.equal(first, stratified_split(TARGETS, 0.25)[1])
    assert not torch.equal(first, stratified_split(TARGETS, 0.25, split_seed=1)[1])


def test_subset_counts_and_nesting():
    indices = torch.arange(4, 76)
    counts = torch.bincount(TARGETS[indices], minlength=5)
    half = subset(indices, TARGETS, 0.5)
    assert torch.bincount(TARGETS[half], minlength=5).tolist() == [
        max(1, round(0.5 * n)) if n else 0 for n in counts.tolist()
    ]
    few = subset(indices, TARGETS, 0.5, 3)
    assert torch.bincount(TARGETS[few], minlength=5).tolist() == [
        min(3, max(1, round(0.5 * n))) if n else 0 for n in counts.tolist()
    ]
    assert set(few.tolist()) < set(half.tolist()) < set(indices.tolist())
    assert torch.equal(subset(indices, TARGETS), indices)


def order(epoch, seed=0, world=1, rank=0, size=10):
    sampler = EpochSampler(range(size), num_replicas=world, rank=rank, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_sampler_yields_every_sample_once_in_an_order_of_the_seed_and_epoch():
    keys = order(3)
    assert {epoch for epoch, _ in keys} == {3}
    assert sorted(index for _, index in keys) == list(range(10))
    assert keys == order(3)
    # torch's own sampler seeds with seed + epoch, so these would be equal
    assert [i for _, i in order(0, seed=1, size=50)] != [i for _, i in order(1, seed=0, size=50)]


def test_ranks_share_the_batches_of_one_process():
    whole = order(1, size=13)
    ranks = [order(1, world=2, rank=rank, size=13) for rank in range(2)]
    assert [len(keys) for keys in ranks] == [6, 6]
    for batch in range(3):
        together = [key for keys in ranks for key in keys[2 * batch : 2 * batch + 2]]
        assert sorted(together) == sorted(whole[4 * batch : 4 * batch + 4])


class Echo(torch.utils.data.Dataset):
    def __init__(self, images=23):
        self.images = images

    def __len__(self):
        return self.images

    def __getitems__(self, keys):
        return list(keys)

    def __getitem__(self, key):
        return key


def loader(workers=0, *, images=23, batch_size=4, replicas=1, rank=0, **options):
    data = Echo(images)
    sampler = EpochSampler(data, **{"seed": 5, "num_replicas": replicas, "rank": rank, **options})
    return ResumableLoader(
        data, batch_size=batch_size, sampler=sampler, num_workers=workers, collate_fn=as_is, drop_last=True
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
@pytest.mark.parametrize("workers", [0, 2])
def test_loader_resumes_where_its_state_was_taken(workers):
    whole = loader()
    whole.sampler.set_epoch(2)
    batches = list(whole)
    first = loader(workers)
    first.sampler.set_epoch(2)
    iterator = iter(first)
    seen = [next(iterator) for _ in range(3)]
    state = first.state_dict()
    assert (state["epoch"], state["batches"]) == (2, 3)
    del iterator
    second = loader(workers)
    second.load_state_dict(state)
    second.sampler.set_epoch(2)
    assert len(second) == 5
    rest = []
    for batch in second:
        rest.append(batch)
        assert second.state_dict()["batches"] == (3 + len(rest)) % 5
    assert seen + rest == batches
    assert list(second) == batches  # the next time it starts from the beginning


def test_state_of_a_shortened_epoch_does_not_shorten_the_next():
    first = loader()
    iterator = iter(first)
    next(iterator)
    state = first.state_dict()  # what `limit_train_batches=1` leaves at the end of epoch 0
    second = loader()
    second.load_state_dict(state)
    second.sampler.set_epoch(1)
    assert len(list(second)) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 8}, "data.batch_size was 4 and is 8"),
        ({"images": 30}, "the number of training images was 23 and is 30"),
        ({"seed": 6}, "data.seed was 5 and is 6"),
        ({"balance": torch.arange(23) % 2}, "data.sampling was shuffle and is balanced"),
        ({"batch_size": 4, "replicas": 2}, "data.batch_size was 4 and is 8"),
    ],
)
def test_an_epoch_cannot_go_on_with_other_batches(change, said):
    first = loader()
    iterator = iter(first)
    next(iterator)
    second = loader(**change)
    second.sampler.set_epoch(1)  # the next epoch may differ
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(0)
    with pytest.raises(ACKDError, match=rf"after batch 1 of epoch 1 .*{said}"):
        second.load_state_dict(first.state_dict())


def test_an_epoch_goes_on_in_more_processes_with_the_same_global_batch():
    whole = list(loader())
    first = loader()
    iterator = iter(first)
    state = [next(iterator) and first.state_dict() for _ in range(2)][-1]
    rest = []
    for rank in range(2):
        each = loader(batch_size=2, replicas=2, rank=rank)
        each.load_state_dict(state)
        rest.append(list(each))
    assert [sorted(one + two) for one, two in zip(*rest, strict=True)] == [sorted(each) for each in whole[2:]]


def test_loader_with_another_sampler_starts_from_the_beginning():
    plain = ResumableLoader(Echo(), batch_size=4, collate_fn=as_is)
    plain.load_state_dict({"epoch": 0, "batches": 2})
    assert next(iter(plain)) == [0, 1, 2, 3]


def test_keys_that_belong_to_the_samples_keep_their_parts():
    targets, keys = torch.arange(60) % 3, torch.randperm(1000)[:60]
    held = set(keys[stratified_split(targets, 0.2, keys=keys)[1]].tolist())
    order = torch.randperm(60)
    again = set(keys[order][stratified_split(targets[order], 0.2, keys=keys[order])[1]].tolist())
    assert held == again
    fewer = set(keys[1:][stratified_split(targets[1:], 0.2, keys=keys[1:])[1]].tolist())
    assert len(held ^ fewer) <= 2


def test_samples_of_one_key_are_in_one_part_and_one_of_each_class_stays():
    keys = torch.arange(40).repeat(2)
    kept, held = stratified_split(torch.arange(80) % 2, 0.2, keys=keys)
    assert len(held) > 0
    assert not set(keys[held].tolist()) & set(keys[kept].tolist())
    assert len(stratified_split(torch.zeros(20, dtype=torch.int64), 0.2, keys=torch.ones(20).long())[0]) == 20


def test_a_subset_by_keys_keeps_its_images_when_one_is_added():
    targets, keys = torch.arange(60) % 3, torch.randperm(1000)[:60]
    few = set(keys[subset(torch.arange(60), targets, max_per_class=5, keys=keys)].tolist())
    fewer = set(keys[1:][subset(torch.arange(59), targets[1:], max_per_class=5, keys=keys[1:])].tolist())
    assert len(few ^ fewer) <= 2
