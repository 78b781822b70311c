"""Any folder of class folders."""

from __future__ import annotations

from pathlib import Path

import torch

from ackd_lightning.data.base import (
    BATCH_SIZE,
    EVAL_BATCH_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    VAL_FRACTION,
    ImageDataModule,
    Source,
)
from ackd_lightning.data.images import Files, class_folders, require_same_classes, scan_class_folders
from ackd_lightning.data.sampling import Part, stratified_split
from ackd_lightning.errors import ACKDError

_TEST_NAMES = ("test", "val", "valid", "validation")
_TEST_SHARE = 0.2
_TEST_SPLIT_SEED = 1  # not the one of the validation split, which is taken out of what remains
_LARGEST = 4096
_IN_MEMORY = 64  # pixels up to which images are held in memory


class ImageFolderDataModule(ImageDataModule):
    """Any folder of class folders: ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``, ``valid``).

    A folder that holds the class folders themselves is split: a stratified fifth of it, always the same, is the test
    set. Up to 64 pixels the images are decoded once, kept in memory and augmented by zero-padded crop and mirror image
    (an image of another size is resized by its shorter side and its centre is cut out); larger ones are read by worker
    processes with random resized crops.

    Args:
        root: folder of the data.
        image_size: height and width that the network gets, in pixels.
        train_dir: folder in ``root`` with the training images; by default ``train``, else ``root`` itself.
        test_dir: folder in ``root`` with the test images; by default the first that is there of ``test``, ``val``,
            ``valid`` and ``validation``.
        mean: mean of each colour channel, of pixels in 0 to 1; by default ImageNet's.
        std: standard deviation of each colour channel; by default ImageNet's.
        batch_size: global training batch: each of W processes takes ``batch_size / W``.
        eval_batch_size: batch of each process in validation, test and prediction.
        val_fraction: share of the training set that is held out for validation; 0 holds nothing out.
        train_fraction: share of each class of the training part that is used, for small runs.
        max_per_class: at most so many training images of each class.
        num_workers: worker processes of each loader; results do not depend on it.
        seed: seed of shuffling and augmentation; by default the one of ``seed_everything``, or 0.
        cache: keep decoded images, or the list of checked files, as a file in ``root``.

    Raises:
        ACKDError: if ``root`` holds no such folders.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int = 32,
        train_dir: str | None = None,
        test_dir: str | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        batch_size: int = BATCH_SIZE,
        eval_batch_size: int = EVAL_BATCH_SIZE,
        val_fraction: float = VAL_FRACTION,
        train_fraction: float = 1.0,
        max_per_class: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        cache: bool = True,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            max_per_class=max_per_class,
            num_workers=num_workers,
            seed=seed,
            cache=cache,
        )
        if not 8 <= image_size <= _LARGEST:
            raise ACKDError(f"image_size is {image_size}: use 8 pixels or more, up to {_LARGEST}")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ACKDError(f"{name} has {len(values)} values: give one for each of the 3 colour channels")
        if min(std) <= 0:
            raise ACKDError(f"std is {tuple(std)}: each value has to be above 0")
        self.input_size = image_size
        self.mean = (mean[0], mean[1], mean[2])
        self.std = (std[0], std[1], std[2])
        self._train_folder, self._test_folder = self._layout(train_dir, test_dir)
        self.class_names = tuple(folder.name for folder in class_folders(self._train_folder))
        if not self.class_names:
            scan_class_folders(self._train_folder)  # says what is there instead
        self.num_classes = len(self.class_names)
        if self._test_folder is not None and (there := class_folders(self._test_folder)):
            require_same_classes(self.class_names, [folder.name for folder in there], "train", "test")

    def _layout(self, train_dir: str | None, test_dir: str | None) -> tuple[Path, Path | None]:
        """Find the folders of both parts; no test folder means that the training folder is split."""
        if not self.root.is_dir():
            raise ACKDError(f"there is no folder {self.root}: set root to a folder of class folders")
        for name in (train_dir, test_dir):
            if name is not None and not (self.root / name).is_dir():
                there = ", ".join(folder.name for folder in class_folders(self.root)[:5]) or "no folders"
                raise ACKDError(f"there is no folder {self.root / name}: {self.root} holds {there}")
        if train_dir is not None:
            train = self.root / train_dir
        else:
            train = self.root / "train" if (self.root / "train").is_dir() else self.root
        if test_dir is not None:
            return train, self.root / test_dir
        found = [name for name in _TEST_NAMES if (self.root / name).is_dir()]
        if found and train == self.root:
            raise ACKDError(
                f"{self.root} holds the folder {found[0]} but no folder train: name the training folder with train_dir"
            )
        return train, self.root / found[0] if found else None

    def _load(self, part: Part) -> Source:
        if part == "train" or self._test_folder is None:
            files = scan_class_folders(self._train_folder)
            if self._test_folder is None:
                kept, held_out = stratified_split(files.targets, _TEST_SHARE, split_seed=_TEST_SPLIT_SEED)
                files = _choose(files, kept if part == "train" else held_out)
        else:
            files = scan_class_folders(self._test_folder)
        if self.input_size <= _IN_MEMORY:
            return self._decoded(files, self.root, part)
        return self._checked(files, self.root, part)


def _choose(files: Files, rows: torch.Tensor) -> Files:
    paths = tuple(files.paths[row] for row in rows.tolist())
    return Files(files.root, files.class_names, paths, files.targets[rows])
