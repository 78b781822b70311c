"""Stratified splits, the order of the samples, and loaders that can be resumed.

Nothing here keeps random state: every number depends only on (seed, epoch, index, stream).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ackd_lightning.errors import ACKDError
from ackd_lightning.random import mix, stateless_bits

Part = Literal["train", "val", "test"]

# Each stream gives one sample another random number.
STREAM_SPLIT = 101
STREAM_SUBSET = 102
STREAM_SHUFFLE = 103
STREAM_BALANCE = 104
REPEAT = 1 << 32
"""What the epoch of the second, third ... appearance of an image in a balanced epoch grows by, for another view."""
STREAM_CROP_Y = 201
STREAM_CROP_X = 202
STREAM_FLIP = 203
STREAM_TRANSFORM = 204
STREAM_POLICY = 205
STREAM_MIX = 206
IMAGES = "the number of training images"
"""What the number of images is called in the state of a loader."""


def _rank_in_class(targets: Tensor, keys: Tensor) -> Tensor:
    """Return the rank (``N``, from 0) of each sample in its class when the class is sorted by ``keys``."""
    by_key = torch.argsort(keys, stable=True)
    order = by_key[torch.argsort(targets[by_key], stable=True)]
    _, counts = torch.unique_consecutive(targets[order], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts
    return rank


def _per_sample(targets: Tensor, quota: dict[int, int]) -> Tensor:
    """Look up each sample's class in ``quota`` (``N`` int64)."""
    table = torch.zeros(int(targets.max()) + 1, dtype=torch.int64)
    for label, count in quota.items():
        table[label] = count
    return table[targets]


def _class_counts(targets: Tensor) -> dict[int, int]:
    labels, counts = torch.unique(targets, return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def held_out_of(count: int, fraction: float) -> int:
    """Return how many samples of a class `stratified_split` holds out.

    Args:
        count: Number of samples of the class, at least 1.
        fraction: Held-out share of each class.
    """
    return min(round(fraction * count), count - 1)


TEST_SPLIT_SEED = 1
"""Seed of a test set's split: another one than that of the validation split, which takes from the remaining images."""


def stratified_split(
    targets: Tensor, fraction: float, *, split_seed: int = 0, keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split positions into a training part and a held-out part with the same share of every class.

    Of a class with n samples, the ``round(fraction * n)`` whose key has the smallest hash are held out, but one
    sample always stays. The split depends on the targets, the fraction, ``split_seed`` and the keys, never on a run's
    seed. With keys that belong to the samples, each sample that is added or removed moves at most one other;
    samples with the same key, which are one image, are in the same part.

    Args:
        targets: ``N`` int64 class indices.
        fraction: Held-out share of each class, in ``[0, 1)``.
        split_seed: Seed of the split.
        keys: ``N`` int64, such as a hash of each file's name; None for the positions.

    Returns:
        Sorted positions (int64) of the training part and of the held-out part.
    """
    positions = torch.arange(len(targets))
    if not len(targets) or fraction == 0:
        return positions, positions[:0]
    rank = _rank_in_class(targets, stateless_bits(split_seed, positions if keys is None else keys, STREAM_SPLIT))
    quota = {label: held_out_of(n, fraction) for label, n in _class_counts(targets).items()}
    held_out = rank < _per_sample(targets, quota)
    if keys is not None:
        held_out &= ~torch.isin(keys, keys[~held_out])
    return positions[~held_out], positions[held_out]


def subset(
    indices: Tensor,
    targets: Tensor,
    train_fraction: float = 1.0,
    max_per_class: int | None = None,
    keys: Tensor | None = None,
) -> Tensor:
    """Keep a share of each class, for small runs; a smaller share is part of every larger one.

    Args:
        indices: ``N`` positions to choose from, sorted.
        targets: Class index of every position (indexed by ``indices``).
        train_fraction: Share of each class that is kept, at least one sample; in ``(0, 1]``.
        max_per_class: Largest number of samples that is kept of each class; None keeps all.
        keys: What decides which samples are kept, int64, by position, such as a hash of each file's name; None for the
            positions.

    Returns:
        The kept positions, sorted.
    """
    if not len(indices) or (train_fraction == 1 and max_per_class is None):
        return indices
    chosen = targets[indices]
    rank = _rank_in_class(chosen, stateless_bits(0, indices if keys is None else keys[indices], STREAM_SUBSET))
    quota = {label: max(1, round(train_fraction * n)) for label, n in _class_counts(chosen).items()}
    if max_per_class is not None:
        quota = {label: min(n, max_per_class) for label, n in quota.items()}
    return indices[rank < _per_sample(chosen, quota)]


class EpochSampler(DistributedSampler[Any]):
    """Shuffle by (seed, epoch) and yield ``(epoch, index)``, on which a dataset's augmentation depends.

    Lightning keeps a `DistributedSampler` as it is and calls ``set_epoch``. Every rank takes each ``num_replicas``-th
    entry of one permutation: the union of the ranks' k-th batches is the k-th global batch of a single process. Samples
    that do not divide are left out of the epoch, never repeated.

    Args:
        dataset: Object with a length.
        num_replicas: Number of processes.
        rank: Number of this process, from 0.
        seed: Seed of the run.
        balance: ``N`` int64 class indices of the samples, for epochs of the usual length in which all classes appear
            equally often: images of small classes are repeated, each in another view, and some images of large classes
            are left out. None to read every image once.
    """

    def __init__(
        self,
        dataset: Sized,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        balance: Tensor | None = None,
    ) -> None:
        super().__init__(
            cast("Any", dataset), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True
        )
        self._resume: tuple[int, int] = (-1, 0)
        self.balance = balance

    def resume_at(self, epoch: int, start: int) -> None:
        """Skip the first samples of this rank the next time that an epoch is iterated.

        Args:
            epoch: Epoch, from 0.
            start: Number of samples to skip.
        """
        self._resume = (epoch, start)

    @property
    def start(self) -> int:
        """Number of samples of this rank that the next iteration skips."""
        epoch, start = self._resume
        return start if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch, STREAM_SHUFFLE))
        order = torch.randperm(len(cast("Sized", self.dataset)), generator=generator)
        epochs = torch.full_like(order, self.epoch)
        if self.balance is not None:
            order, repeats = balanced(self.balance, mix(self.seed, self.epoch, STREAM_BALANCE), order)
            epochs += REPEAT * repeats
        mine = slice(self.rank, self.total_size, self.num_replicas)
        start, self._resume = self.start, (-1, 0)
        return iter(list(zip(epochs[mine][start:].tolist(), order[mine][start:].tolist(), strict=True)))


def balanced(targets: Tensor, seed: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """Choose N of N samples so that all classes appear equally often, up to one, and those of a class likewise.

    Args:
        targets: ``N`` int64 class indices.
        seed: Seed of the choice.
        places: Permutation of ``N`` places, in which the samples are put.

    Returns:
        Positions of the samples, and how often each was chosen before it, both ``N`` int64.
    """
    count, positions = len(targets), torch.arange(len(targets))
    rank = _rank_in_class(targets, stateless_bits(seed, positions))
    members = torch.argsort(targets * count + rank)  # by class, each in a random order
    classes, sizes = torch.unique(targets, return_counts=True)
    starts, turn = sizes.cumsum(0) - sizes, positions // len(classes)
    own = torch.argsort(stateless_bits(seed, -1 - torch.arange(len(classes))))[positions % len(classes)]
    chosen, repeats = torch.empty_like(positions), torch.empty_like(positions)
    chosen[places] = members[starts[own] + turn % sizes[own]]
    repeats[places] = turn // sizes[own]
    return chosen, repeats


class ImageLoader(DataLoader[Any]):
    """A `DataLoader` that raises a worker's `ACKDError` with its original sentence alone."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
            return
        except ACKDError as error:
            # torch wraps a worker's error: "Caught ACKDError in DataLoader worker process 0." + the traceback.
            sentence = str(error).strip().splitlines()[-1]
            error.__traceback__ = None  # it would keep the worker processes alive, as would raising in this block
        raise ACKDError(sentence.removeprefix(f"{ACKDError.__module__}.{ACKDError.__name__}: "))


class ResumableLoader(ImageLoader):
    """A training loader whose position in the epoch is saved and restored (Lightning's ``_Stateful`` protocol).

    Its sampler is an `EpochSampler`; with any other one (Lightning uses a sequential sampler for ``overfit_batches``)
    it is a plain loader that starts from the beginning. The state counts batches that were returned, not those that
    workers have prepared ahead. The number of processes may change within an epoch, the size of the global batch not.
    """

    _epoch = -1
    _done = 0
    _began: dict[str, Any] | None = None

    def __iter__(self) -> Any:
        sampler = self.sampler
        if isinstance(sampler, EpochSampler):
            self._refuse_another_epoch(sampler)
            self._began = None
            self._epoch, self._done = sampler.epoch, sampler.start // (self.batch_size or 1)
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def _made_of(self) -> dict[str, Any]:
        """Return what the order of an epoch depends on, by the names that a user knows."""
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):
            return {}
        return {
            "data.batch_size": sampler.num_replicas * (self.batch_size or 1),
            IMAGES: len(cast("Sized", self.dataset)),
            "data.seed": sampler.seed,
            "data.sampling": "shuffle" if sampler.balance is None else "balanced",
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches that were returned (0 after the last one), and of what it is."""
        return {"epoch": self._epoch, "batches": self._done % max(len(self), 1), **self._made_of()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the batches of a state when its epoch is iterated next.

        Args:
            state: Result of `state_dict`.

        Raises:
            ACKDError: Within an epoch that began with other batches or images; also raised when the epoch begins.
        """
        sampler = self.sampler
        if isinstance(sampler, EpochSampler):
            sampler.resume_at(state["epoch"], state["batches"] * (self.batch_size or 1))
            self._began = state
            self._refuse_another_epoch(sampler)

    def _refuse_another_epoch(self, sampler: EpochSampler) -> None:
        """Refuse other batches or images; a loader that is made before its epoch is known asks when that begins."""
        if self._began is not None and sampler.start:
            refuse_another_epoch(self._began, self._made_of())


def refuse_another_epoch(began: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on within an epoch in which images would be left out or read twice.

    Args:
        began: State of a loader, with the values that it had when the epoch began.
        now: Its values now, by the names that a user knows.

    Raises:
        ACKDError: If a value differs.
    """
    for name, value in now.items():
        if began.get(name) != value:
            raise ACKDError(
                f"the run stopped after batch {began['batches']} of epoch {began['epoch'] + 1} and cannot go on within "
                f"it: {name} was {began.get(name)} and is {value}, so images would be left out or read twice; give the "
                "earlier value, or start a new run"
            )


def as_is(batch: Sequence[Any]) -> Any:
    """Return a batch unchanged: the collate function for datasets that gather a whole batch at once."""
    return batch
