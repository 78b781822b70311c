"""Any folder of class folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from ackd_lightning.data.sampling import Part, stratified_split
from ackd_lightning.data.sources import Source, class_folders, require_same_classes, scan_class_folders
from ackd_lightning.data.stored import StoredDataModule
from ackd_lightning.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ackd_lightning.errors import ACKDError
from ackd_lightning.validation import Positive, Range, checked

_TEST_NAMES = ("test", "val", "valid", "validation")
_TEST_SHARE = 0.2
_TEST_SPLIT_SEED = 1  # another one than that of the validation split, which is taken from the remaining images
_IN_MEMORY = 64
"""Largest size in pixels at which images are kept in memory."""


class ImageFolderDataModule(StoredDataModule):
    """Any folder of class folders: ``root/train/<class>/*`` and ``root/test/<class>/*`` (or ``val``, ``valid``).

    A folder that holds the class folders themselves is split: a stratified fifth of it, always the same, is the test
    set. Up to 64 pixels the images are decoded once, kept in memory and augmented by zero-padded crop and mirror image
    (an image of another size is resized by its shorter side and cropped in the centre); larger ones are read by worker
    processes with random resized crops.

    Args:
        root: Folder of the data.
        image_size: Height and width of the network's input in pixels.
        train_dir: Folder in ``root`` with the training images; None takes ``train``, or ``root`` itself.
        test_dir: Folder in ``root`` with the test images; None takes the first of ``test``, ``val``, ``valid`` and
            ``validation`` that exists.
        mean: Mean of each colour channel, of pixels in 0 to 1; by default ImageNet's.
        std: Standard deviation of each colour channel, of pixels in 0 to 1; by default ImageNet's.
        options: Argument ``cache``, and those of [`ImageDataModule`][ackd_lightning.data.ImageDataModule].

    Raises:
        ACKDError: If ``root`` holds no such folders.
    """

    @checked
    def __init__(
        self,
        root: str | Path,
        *,
        image_size: Annotated[int, Range(8, 4096)] = 32,
        train_dir: str | None = None,
        test_dir: str | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[Positive, Positive, Positive] = IMAGENET_STD,
        **options: Any,
    ) -> None:
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ACKDError(f"{name} has {len(values)} values: give one for each of the 3 colour channels")
        super().__init__(root, **options)
        self.input_size = image_size
        self.mean = (mean[0], mean[1], mean[2])
        self.std = (std[0], std[1], std[2])
        self._train_folder, self._test_folder = self._layout(train_dir, test_dir)
        folders = class_folders(self._train_folder)
        if not folders:
            scan_class_folders(self._train_folder)  # its error states what the folder holds instead
        self.class_names = tuple(folder.name for folder in folders)
        self.num_classes = len(self.class_names)
        if self._test_folder is not None and (test_folders := class_folders(self._test_folder)):
            require_same_classes(self.class_names, [folder.name for folder in test_folders], "train", "test")

    def _layout(self, train_dir: str | None, test_dir: str | None) -> tuple[Path, Path | None]:
        """Return the folders of both parts; without a test folder the training folder is split."""
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
                files = files.select(kept if part == "train" else held_out)
        else:
            files = scan_class_folders(self._test_folder)
        if self.input_size <= _IN_MEMORY:
            return self._decoded(files, self.root, part)
        return self._checked(files, self.root, part)
