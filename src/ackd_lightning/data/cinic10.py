"""CINIC-10 in its train/valid/test class folders.

Source: L. Darlow et al., CINIC-10 Is Not ImageNet or CIFAR-10, 2018; https://doi.org/10.7488/ds/2448
"""

from __future__ import annotations

from pathlib import Path

from ackd_lightning.data.base import BATCH_SIZE, EVAL_BATCH_SIZE, ROOT
from ackd_lightning.data.download import Archive, DownloadedDataModule, extract
from ackd_lightning.data.images import Pixels, scan_class_folders
from ackd_lightning.data.sampling import Part
from ackd_lightning.errors import ACKDError

_FOLDERS: dict[Part, str] = {"train": "train", "val": "valid", "test": "test"}


class CINIC10DataModule(DownloadedDataModule):
    """CINIC-10: 90,000 images of 32 x 32 each for training, validation and test, in 10 classes.

    Trains on ``train``, validates on ``valid``, tests on ``test``; nothing is held out of the training images.
    ``val_fraction=0`` is the paper's protocol: ``valid`` is not read and the test set is looked at while training.

    Args:
        root: folder that holds train/, valid/ and test/, or a folder ``cinic-10`` with them, or the archive.
        batch_size: global training batch: each of W processes takes ``batch_size / W``.
        eval_batch_size: batch of each process in validation, test and prediction.
        val_fraction: share of the images in ``valid`` that is used, up to 1; 0 looks at the test set instead.
        train_fraction: share of each class of the training part that is used, for small runs.
        max_per_class: at most so many training images of each class.
        num_workers: worker processes of each loader; results do not depend on it.
        seed: seed of shuffling and augmentation; by default the one of ``seed_everything``, or 0.
        download: fetch the archive when the data are not there.
        url: a mirror (http, https or file) of the official archive; its checksum has to be the same.
        cache: keep decoded images as a file next to the data.
    """

    num_classes = 10
    published_train_images = 90_000
    mean = (0.47889522, 0.47227842, 0.43047404)
    std = (0.24205776, 0.23828046, 0.25874835)
    input_size = 32
    archive = Archive(
        name="CINIC-10",
        url="https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
        filename="CINIC-10.tar.gz",
        md5="6ee4d0c996905fe93221de577967a372",
        size=687_544_992,
    )

    def __init__(
        self,
        root: str | Path = ROOT,
        *,
        batch_size: int = BATCH_SIZE,
        eval_batch_size: int = EVAL_BATCH_SIZE,
        val_fraction: float = 1.0,
        train_fraction: float = 1.0,
        max_per_class: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
        download: bool = True,
        url: str | None = None,
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
            download=download,
            url=url,
            cache=cache,
        )

    def _class_place(self) -> Path:
        return self._place() / "train"

    @property
    def _own_validation(self) -> bool:
        return not self.val_is_test

    def _check_val_fraction(self, val_fraction: float) -> None:
        if not 0 <= val_fraction <= 1:
            raise ACKDError(f"val_fraction is {val_fraction}: for CINIC-10 it is a share of `valid`, from 0 to 1")

    def _place(self) -> Path:
        for place in (self.root, self.root / "cinic-10", self.root / "CINIC-10"):
            if (place / "train").is_dir():
                return place
        return self.root / "cinic-10"

    def _fetch(self) -> None:
        place = self._place()
        if not (place / "train").is_dir():
            extract(self._archive_file(), place)

    def _load(self, part: Part) -> Pixels:
        place = self._place()
        remedy = "CINIC-10 has the folders train, valid and test with one folder for each class, as in its archive"
        return self._decoded(scan_class_folders(place / _FOLDERS[part], remedy=remedy), place, part)
