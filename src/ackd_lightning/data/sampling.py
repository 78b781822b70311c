"""Which sample comes when: stratified splits, and loaders that can be resumed.

Nothing here keeps random state: every number is keyed by (seed, epoch, index, stream).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from ackd_lightning.errors import ACKDError
from ackd_lightning.random import keyed_bits, mix

Part = Literal["train", "val", "test"]

# Streams keep apart the numbers that one sample needs.
STREAM_SPLIT = 101
STREAM_SUBSET = 102
STREAM_SHUFFLE = 103
STREAM_CROP_Y = 201
STREAM_CROP_X = 202
STREAM_FLIP = 203
STREAM_TRANSFORM = 204


def _rank_in_class(targets: Tensor, keys: Tensor) -> Tensor:
    """Position (``N``, from 0) of each sample among those of its class when the class is sorted by ``keys``."""
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


def stratified_split(targets: Tensor, fraction: float, *, split_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split positions into a training part and a held-out part with the same share of every class.

    A class of n samples gives ``round(fraction * n)`` of them, those whose index has the smallest hash, but always
    keeps one. The split is a function of the targets, the fraction and ``split_seed``, never of a run's seed.

    Args:
        targets: ``N`` int64 class indices.
        fraction: held-out share of each class, in ``[0, 1)``.
        split_seed: another number gives another split.

    Returns:
        Sorted positions (int64) of the training part and of the held-out part.

    Raises:
        ACKDError: if ``fraction`` is outside ``[0, 1)``.
    """
    if not 0 <= fraction < 1:
        raise ACKDError(f"val_fraction is {fraction}: it is a share of the images, from 0 up to but not including 1")
    positions = torch.arange(len(targets))
    if not len(targets) or fraction == 0:
        return positions, positions[:0]
    rank = _rank_in_class(targets, keyed_bits(split_seed, positions, STREAM_SPLIT))
    quota = {label: min(round(fraction * n), n - 1) for label, n in _class_counts(targets).items()}
    held_out = rank < _per_sample(targets, quota)
    return positions[~held_out], positions[held_out]


def subset(indices: Tensor, targets: Tensor, train_fraction: float = 1.0, max_per_class: int | None = None) -> Tensor:
    """Keep a share of each class, for small runs; a smaller share is part of every larger one.

    Args:
        indices: ``N`` positions to choose from, sorted.
        targets: class of every position (indexed by ``indices``).
        train_fraction: share of each class that is kept, at least one sample; in ``(0, 1]``.
        max_per_class: at most so many of each class.

    Returns:
        The kept positions, sorted.

    Raises:
        ACKDError: if a limit is out of its range.
    """
    if not 0 < train_fraction <= 1:
        raise ACKDError(f"train_fraction is {train_fraction}: it is a share of the images, above 0 and up to 1")
    if max_per_class is not None and max_per_class < 1:
        raise ACKDError(f"max_per_class is {max_per_class}: use 1 or more, or leave it out to keep every image")
    if not len(indices) or (train_fraction == 1 and max_per_class is None):
        return indices
    chosen = targets[indices]
    rank = _rank_in_class(chosen, keyed_bits(0, indices, STREAM_SUBSET))
    quota = {label: max(1, round(train_fraction * n)) for label, n in _class_counts(chosen).items()}
    if max_per_class is not None:
        quota = {label: min(n, max_per_class) for label, n in quota.items()}
    return indices[rank < _per_sample(chosen, quota)]


class EpochSampler(DistributedSampler[Any]):
    """Shuffle by (seed, epoch) and yield ``(epoch, index)`` keys, so that a dataset knows what to augment by.

    Being a `DistributedSampler`, it is left alone by Lightning, which calls ``set_epoch``. Every rank takes each
    ``num_replicas``-th entry of one permutation: the union of the ranks' k-th batches is the k-th global batch of a
    single process. Samples that do not divide are left out of the epoch, never repeated.

    Args:
        dataset: anything with a length.
        num_replicas: number of processes.
        rank: this process.
        seed: seed of the run.
    """

    def __init__(self, dataset: Sized, *, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(
            cast("Any", dataset), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True
        )
        self._resume: tuple[int, int] = (-1, 0)

    def resume_at(self, epoch: int, start: int) -> None:
        """Leave out the first ``start`` samples of this rank the next time that ``epoch`` is iterated."""
        self._resume = (epoch, start)

    @property
    def start(self) -> int:
        """Samples of this rank that the next iteration leaves out."""
        epoch, start = self._resume
        return start if epoch == self.epoch else 0

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch, STREAM_SHUFFLE))
        order = torch.randperm(len(cast("Sized", self.dataset)), generator=generator)
        mine = order[self.rank : self.total_size : self.num_replicas]
        start, self._resume = self.start, (-1, 0)
        epoch = self.epoch
        return iter([(epoch, index) for index in mine[start:].tolist()])


class ImageLoader(DataLoader[Any]):
    """A `DataLoader` that gives back a worker's `ACKDError` as the sentence it was."""

    def __iter__(self) -> Any:
        try:
            yield from super().__iter__()
            return
        except ACKDError as error:
            # torch wraps a worker's error: "Caught ACKDError in DataLoader worker process 0." + the traceback.
            sentence = str(error).strip().splitlines()[-1]
            error.__traceback__ = None  # it would keep the worker processes alive, and so would raising in here
        raise ACKDError(sentence.removeprefix(f"{ACKDError.__module__}.{ACKDError.__name__}: "))


class ResumableLoader(ImageLoader):
    """A training loader whose place in the epoch is saved and restored (Lightning's ``_Stateful`` protocol).

    Its sampler is an `EpochSampler`; with any other (Lightning puts a sequential one in for ``overfit_batches``) it is
    a plain loader that starts from the beginning. The state counts batches that were handed out, not those that
    workers have prepared ahead.
    """

    _epoch = -1
    _done = 0

    def __iter__(self) -> Any:
        sampler = self.sampler
        if isinstance(sampler, EpochSampler):
            self._epoch, self._done = sampler.epoch, sampler.start // (self.batch_size or 1)
        for batch in super().__iter__():
            self._done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches that were handed out (0 when all of them were)."""
        return {"epoch": self._epoch, "batches": self._done % max(len(self), 1)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches in ``state`` when its epoch is iterated next."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.resume_at(state["epoch"], state["batches"] * (self.batch_size or 1))


def as_is(batch: Sequence[Any]) -> Any:
    """Collate function for datasets that gather a whole batch at once: hand it on unchanged."""
    return batch
