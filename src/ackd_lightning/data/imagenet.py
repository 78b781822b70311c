"""ImageNet (ILSVRC 2012) as class folders.

Source: https://www.image-net.org/challenges/LSVRC/2012/ (needs an account, so it is not downloaded).
"""

from __future__ import annotations

from pathlib import Path

from ackd_lightning.data.folders import class_folders, scan_class_folders
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Files
from ackd_lightning.data.stored import StoredDataModule
from ackd_lightning.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ackd_lightning.data.walk import image_files
from ackd_lightning.errors import ACKDError

_LAYOUT = (
    "lay ImageNet out as train/<wnid>/*.JPEG (unpack each of the 1,000 inner archives of ILSVRC2012_img_train.tar into "
    "a folder with its name) and val/<wnid>/*.JPEG (sort the 50,000 images by their wnid)"
)


class ImageNetDataModule(StoredDataModule):
    """ImageNet: 1,281,167 training and 50,000 validation images in 1,000 classes, read by worker processes at 224.

    ``root`` holds ``train`` and ``val``, each with one folder for each class, of all classes or some. Unpack each of
    the inner archives of ``ILSVRC2012_img_train.tar`` into ``train/<wnid>/`` and sort the images of
    ``ILSVRC2012_img_val.tar`` into ``val/<wnid>/``. Training: random resized crop and mirror image; evaluation: shorter
    side resized to 256, centre crop of 224. The test set is ``val``. Arguments are ``root``, ``cache``, and those of
    [`ImageDataModule`][ackd_lightning.data.ImageDataModule].
    """

    num_classes = 1000
    published_train_images = 1_281_167
    mean = IMAGENET_MEAN
    std = IMAGENET_STD
    input_size = 224

    def _class_place(self) -> Path:
        return self.root / "train"

    def _load(self, part: Part) -> Files:
        folder = self.root / ("train" if part == "train" else "val")
        if folder.is_dir() and not class_folders(folder) and (loose := len(image_files(folder))):
            raise ACKDError(
                f"{folder} holds {loose:,} images in one flat folder, so their classes are unknown: "
                f"sort them into {folder}/<wnid>/ by the official ground truth"
            )
        classes = None if part == "train" else self._folder_classes()
        return self._checked(scan_class_folders(folder, classes=classes, remedy=_LAYOUT), self.root, part)
