"""Images in tar shards, streamed: for sets that no folder holds."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ackd_lightning.data.augmentation import ImageAugmentation
from ackd_lightning.data.datasets import EVAL_BORDER, augmented_crop, reduction
from ackd_lightning.data.decoding import Encoded, load_for_crop, load_image
from ackd_lightning.data.labels import composed
from ackd_lightning.data.pixels import ImageFormat, bits, convert, fit, is_deep, to_tensor
from ackd_lightning.data.sampling import IMAGES, STREAM_SHUFFLE, STREAM_TRANSFORM, ImageLoader, refuse_another_epoch
from ackd_lightning.data.transforms import RawBatch
from ackd_lightning.data.walk import extensions
from ackd_lightning.errors import ACKDError, first_line
from ackd_lightning.random import mix


@dataclass(frozen=True)
class ShardFormat:
    """What the samples of shards are and become.

    Attributes:
        image: What image files become.
        crop: Whether training images are cropped at random when they are read, as large ones are.
        classes: Class index by the text of a label.
        label_key: Ending of the files with the labels.
        image_key: Ending of the files with the images; None for the only one of an image in each sample.
        change: Policy and erasing of training images; None for none.
        smallest_crop: Smallest share of an image's area that a random crop keeps.
        shift: Padded crop and mirror image of small training images, which come before ``change``; without ``change``
            they are left to the device.
    """

    image: ImageFormat
    crop: bool
    classes: dict[str, int]
    label_key: str
    image_key: str | None = None
    change: ImageAugmentation | None = None
    smallest_crop: float = 0.08
    shift: Callable[[RawBatch], Tensor] | None = None

    def image_ending(self, endings: Sequence[str], place: str) -> str:
        """Return the ending of a sample's image.

        Args:
            endings: Endings of its files in lower case, without the dot.
            place: Name of the sample, for messages.

        Raises:
            ACKDError: If there is none, or ``image_key`` is not given and there are several.
        """
        found = image_endings(endings, self.image_key)
        if not found:
            what = "image" if self.image_key is None else f"image .{self.image_key}"
            raise ACKDError(f"{place} has no {what}: its files end in {', '.join(endings)}")
        if len(found) > 1:
            raise ACKDError(f"{place} has the images {' and '.join(found)}: set image_key to the ending of one")
        return found[0]

    def target(self, label: bytes | None, place: str) -> int:
        """Return the class index of a label.

        Args:
            label: Content of the file with the label.
            place: Name of the sample, for messages.

        Raises:
            ACKDError: If there is none, or it is not a class.
        """
        if label is None:
            raise ACKDError(f"{place} has no file .{self.label_key} with its label: set label_key to its ending")
        text = composed([label[:200].decode("utf-8", "replace")])[0].strip()
        if text not in self.classes:
            raise ACKDError(
                f"the label {text[:60]!r} of {place} is not a class: it must be a name of class_names, or a number "
                "from 0 to num_classes - 1"
            )
        return self.classes[text]


class Shards(IterableDataset[RawBatch]):
    """Batches of the images in tar shards, read by the package webdataset.

    In training, the order of the shards and that of the images in a buffer are functions of (seed, epoch). Every
    process and worker reads a piece of its own of all images in the order of the shards, whose ends need not be those
    of shards, so that no image is read twice in an epoch. In evaluation each has shards of its own, and every image is
    read once.

    Args:
        urls: Shards.
        form: What their samples are and become.
        batch_size: Images of a batch in this process.
        batches: Number of batches of an epoch in this process; None reads every image once, in order.
        counts: Number of images of each shard; only for training.
        seed: Seed of the run.
        place: Rank of this process, and number of processes.
        buffer: Number of images that are shuffled among each other.
    """

    def __init__(
        self,
        urls: Sequence[str],
        form: ShardFormat,
        *,
        batch_size: int,
        batches: int | None,
        counts: Sequence[int] = (),
        seed: int,
        place: tuple[int, int],
        buffer: int,
    ) -> None:
        self.urls, self.form, self.counts = list(urls), form, list(counts)
        self.batch_size, self.batches = batch_size, batches
        self.seed, self.place, self.buffer = seed, place, buffer
        self.epoch, self.done = 0, 0

    def __iter__(self) -> Iterator[RawBatch]:
        """Yield the batches of this worker, after those that a resumed run has done."""
        worker = get_worker_info()
        count, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        rank, world = self.place
        if self.batches is None:
            own = self.urls[rank * count + number :: world * count]
            yield from self._batches(self._samples(own), epoch=-1)
            return
        role = (number + self.done) % count  # the loader asks worker 0 first, whose turn it need not be
        first = self.done + (role - self.done) % count
        before = rank * self.batches + sum(len(range(other, self.batches, count)) for other in range(role))
        turns = len(range(role, self.batches, count))
        start, stop = before * self.batch_size, (before + turns) * self.batch_size
        done = len(range(role, first, count))
        samples = itertools.islice(self._shuffled(start, stop), done * self.batch_size, None)
        read = 0
        for batch in self._batches(samples, epoch=self.epoch):
            read += 1
            yield batch
        if read < turns - done:
            raise ACKDError(
                f"the shards beside {self.urls[0]} hold fewer images than when they were counted: start again"
            )

    def _shuffled(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Read a piece of the training images in this epoch's order of the shards, shuffled in a buffer."""
        import webdataset as wds

        seed = mix(self.seed, self.epoch, STREAM_SHUFFLE)
        order = torch.randperm(len(self.urls), generator=torch.Generator().manual_seed(seed)).tolist()
        ends = list(itertools.accumulate(self.counts[each] for each in order))
        from_shard, to_shard = bisect_right(ends, start), bisect_left(ends, stop)
        skipped = start - (ends[from_shard - 1] if from_shard else 0)
        samples = self._samples([self.urls[each] for each in order[from_shard : to_shard + 1]])
        piece = itertools.islice(samples, skipped, skipped + stop - start)
        if not self.buffer:
            return piece
        shuffle = wds.detshuffle(self.buffer, initial=self.buffer, seed=seed, epoch=-1)
        return cast("Iterator[dict[str, Any]]", shuffle.run(piece))

    def _samples(self, urls: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Read the samples of some shards."""
        import webdataset as wds

        if not urls:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield from wds.DataPipeline(wds.SimpleShardList(urls, seed=None), wds.tarfile_to_samples())
        except ACKDError:
            raise
        except Exception as error:  # a damaged shard can fail in any way
            raise ACKDError(f"a shard cannot be read ({first_line(error, 300)}): write it again") from None

    def _batches(self, samples: Iterator[dict[str, Any]], *, epoch: int) -> Iterator[RawBatch]:
        while chosen := list(itertools.islice(samples, self.batch_size)):
            if epoch >= 0 and len(chosen) < self.batch_size:
                return
            read = [self._read(sample, epoch) for sample in chosen]
            image = torch.stack([each[0] for each in read])
            target, index = (torch.tensor([each[column] for each in read]) for column in (1, 2))
            batch = RawBatch(image, target, index, torch.full_like(index, epoch if self._left_to_device(epoch) else -1))
            yield batch if epoch < 0 else batch._replace(first=(epoch, int(index[0])))

    def _left_to_device(self, epoch: int) -> bool:
        """Whether crop and mirror image are left to the device."""
        return epoch >= 0 and not self.form.crop and self.form.change is None

    def _read(self, sample: dict[str, Any], epoch: int) -> tuple[Tensor, int, int]:
        """Return image, class index and a hash of shard and key, on which the augmentation depends."""
        place = f"{sample['__key__']} in {sample['__url__']}"
        ending = self.form.image_ending([key for key in sample if key[0] != "_"], place)
        target = self.form.target(sample.get(self.form.label_key), place)
        index = key_hash(f"{Path(sample['__url__']).name}/{sample['__key__']}")
        form, smallest = self.form.image, self.form.smallest_crop
        file = Encoded(f"{sample['__url__']}, {sample['__key__']}.{ending}", sample[ending])
        seed = mix(self.seed, epoch, index, STREAM_TRANSFORM)
        cropped = epoch >= 0 and self.form.crop
        raw, whole = (
            load_for_crop(file, form.channels, reduction(form, seed, smallest)) if cropped else (load_image(file), None)
        )
        if is_deep(raw) != form.deep and (not form.deep or form.value_range is not None):
            raise ACKDError(
                f"{place} has {bits(not form.deep)} and the first image of the training shards has {bits(form.deep)}: "
                "write shards of images with the same depth"
            )
        image = convert(raw, form, file.name)
        if cropped:
            pixels = augmented_crop(image, form, seed, smallest, whole)
        else:
            pixels = to_tensor(fit(image, form.size, border=EVAL_BORDER if self.form.crop else 1), form)
        if epoch >= 0 and self.form.change is not None:
            if not cropped and self.form.shift is not None:
                labels, positions, epochs = (torch.tensor([each]) for each in (target, index, epoch))
                pixels = self.form.shift(RawBatch(pixels[None], labels, positions, epochs))[0]
            pixels = self.form.change(pixels, epoch, index)
        return pixels, target, index


def key_hash(key: str) -> int:
    """Return a number from 0 to 2^62 - 1 that depends on a key alone.

    Args:
        key: Name of a shard and key of a sample in it.
    """
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 2


def image_endings(names: Sequence[str], key: str | None) -> list[str]:
    """Return those of some endings that are of images.

    Args:
        names: Endings in lower case, such as ``jpg``, ``mask.png`` and ``cls``.
        key: The only ending that counts; None for all of images.
    """
    known = extensions()
    return [name for name in names if (f".{name.rpartition('.')[2]}" in known if key is None else name == key)]


class ShardLoader:
    """Loader of shards with the position in the epoch saved and restored (Lightning's ``_Stateful`` protocol).

    Args:
        shards: Shards.
        options: Options of torch's ``DataLoader``.
    """

    def __init__(self, shards: Shards, **options: Any) -> None:
        self.shards = shards
        self.loader = ImageLoader(shards, batch_size=None, **options)
        self._began: dict[str, Any] | None = None
        self._done = 0

    def __len__(self) -> int:
        if self.shards.batches is None:
            raise TypeError("the number of batches is unknown")
        return self.shards.batches

    batch_sampler = None

    @property
    def sampler(self) -> ShardLoader:
        """Object whose ``set_epoch`` Lightning calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        Args:
            epoch: Epoch, from 0.
        """
        self.shards.epoch = epoch

    def __iter__(self) -> Iterator[RawBatch]:
        self.shards.done = self._done = self._refuse_another_epoch()
        self._began = None
        for batch in self.loader:
            self._done += 1
            yield batch

    def _made_of(self) -> dict[str, Any]:
        """Return the numbers on which the order of an epoch depends; every process and worker reads its own piece."""
        world = self.shards.place[1]
        return {
            "data.batch_size": world * self.shards.batch_size,
            "processes": world,
            "data.num_workers": max(1, self.loader.num_workers),
            "data.buffer": self.shards.buffer,
            "data.seed": self.shards.seed,
            IMAGES: sum(self.shards.counts),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches that were returned (0 after the last one), and of what it is."""
        done = self._done % max(self.shards.batches or 1, 1)
        return {"epoch": self.shards.epoch, "batches": done, **self._made_of()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume after the batches of a state when its epoch is iterated next.

        Args:
            state: Result of `state_dict`.

        Raises:
            ACKDError: Within an epoch that began with other batches, images or workers; also raised when the epoch
                begins.
        """
        self._began = state
        self._refuse_another_epoch()

    def _refuse_another_epoch(self) -> int:
        """Return how many batches of this epoch were returned before; refuse others than it began with."""
        if self._began is None or self._began["epoch"] != self.shards.epoch or not self._began["batches"]:
            return 0
        refuse_another_epoch(self._began, self._made_of())
        return int(self._began["batches"])


def expand(root: Path, pattern: str) -> list[Path]:
    """Return the local shards that a pattern names, sorted.

    Args:
        root: Folder that the pattern is relative to.
        pattern: Name with ``*`` or with a range such as ``{000..146}``.

    Raises:
        ACKDError: If there are none, some are missing, or the pattern is not a local path.
    """
    import braceexpand

    if "://" in pattern or pattern.startswith("pipe:"):
        raise ACKDError(f"shards {pattern!r} are not local files: copy them into {root}, nothing is fetched")
    try:
        names = list(braceexpand.braceexpand(pattern))
    except Exception as error:  # unbalanced braces and unequal ranges have exceptions of their own
        raise ACKDError(
            f"shards {pattern!r} cannot be expanded ({error}): write a range such as {{000..146}}"
        ) from None
    matching = {name: _matching(root / name) for name in names}
    found = [path for name in names for path in matching[name]]
    if not found:
        raise ACKDError(f"{root} has no shards {pattern!r}: name tar files, such as train-{{000..146}}.tar")
    if missing := [name for name, paths in matching.items() if not paths]:
        raise ACKDError(
            f"shards {pattern!r} are incomplete: {len(missing):,} of {len(names):,} missing, the first is "
            f"{root / missing[0]}: add them"
        )
    if twice := [path for path, count in Counter(found).items() if count > 1]:
        raise ACKDError(f"shards {pattern!r} name {twice[0]} more than once: name each shard once")
    return found


def _matching(path: Path) -> list[Path]:
    """Files of a name whose last parts may have wildcards; one that exists stands for itself."""
    if path.is_file():
        return [path]
    base, rest = path, Path()
    while not base.exists():
        base, rest = base.parent, base.name / rest
    return [each for each in sorted(base.glob(str(rest))) if each.is_file()] if rest.parts else []
