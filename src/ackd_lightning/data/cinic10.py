"""CINIC-10 in its train/valid/test class folders.

Source: L. Darlow et al., CINIC-10 Is Not ImageNet or CIFAR-10, 2018; https://doi.org/10.7488/ds/2448
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ackd_lightning.data.download import Archive, DownloadedDataModule, extract
from ackd_lightning.data.folders import scan_class_folders
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Pixels
from ackd_lightning.data.stored import ROOT
from ackd_lightning.validation import Fraction

_FOLDERS: dict[Part, str] = {"train": "train", "val": "valid", "test": "test"}


class CINIC10DataModule(DownloadedDataModule):
    """CINIC-10: 90,000 images of 32 x 32 each for training, validation and test, in 10 classes.

    Trains on ``train``, validates on ``valid`` and tests on ``test``; nothing is held out of the training images. With
    ``val_fraction=0``, the protocol of the ACKD paper, ``valid`` is not read and validation reads the test set.

    Args:
        root: Folder that holds train/, valid/ and test/, or a folder ``cinic-10`` with them, or the archive.
        val_fraction: Share of the images in ``valid`` that is used, up to 1; 0 validates on the test set.
        options: Arguments of `DownloadedDataModule` and of
            [`ImageDataModule`][ackd_lightning.data.ImageDataModule].
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

    def __init__(self, root: str | Path = ROOT, *, val_fraction: Fraction = 1.0, **options: Any) -> None:
        super().__init__(root, val_fraction=val_fraction, **options)

    def _class_place(self) -> Path:
        return self._place() / "train"

    @property
    def _own_validation(self) -> bool:
        return not self.val_is_test

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
        classes = None if part == "train" else self._folder_classes()
        return self._decoded(scan_class_folders(place / _FOLDERS[part], classes=classes, remedy=remedy), place, part)
