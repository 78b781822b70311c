"""Data: one `LightningDataModule` for each data set, all with the same options."""

from ackd_lightning.data.augment import RawBatch
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.cifar import CIFAR100DataModule
from ackd_lightning.data.cinic10 import CINIC10DataModule
from ackd_lightning.data.digits import DigitsDataModule
from ackd_lightning.data.folder import ImageFolderDataModule
from ackd_lightning.data.imagenet import ImageNetDataModule
from ackd_lightning.data.tiny_imagenet import TinyImageNetDataModule

__all__ = [
    "CIFAR100DataModule",
    "CINIC10DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "RawBatch",
    "TinyImageNetDataModule",
]
