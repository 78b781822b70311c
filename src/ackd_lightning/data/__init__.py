"""One data module for each data set, with reading and augmentation of images; networks and losses may not be here."""

from ackd_lightning.data.augmentation import Augmentation
from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.cifar import CIFAR100DataModule
from ackd_lightning.data.cinic10 import CINIC10DataModule
from ackd_lightning.data.digits import DigitsDataModule
from ackd_lightning.data.folder import ImageFolderDataModule
from ackd_lightning.data.huggingface import HuggingFaceDataModule
from ackd_lightning.data.imagenet import ImageNetDataModule
from ackd_lightning.data.table import TableDataModule
from ackd_lightning.data.tiny_imagenet import TinyImageNetDataModule
from ackd_lightning.data.transforms import RawBatch
from ackd_lightning.data.webdataset import WebDatasetDataModule

__all__ = [
    "Augmentation",
    "CIFAR100DataModule",
    "CINIC10DataModule",
    "DigitsDataModule",
    "HuggingFaceDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageNetDataModule",
    "RawBatch",
    "TableDataModule",
    "TinyImageNetDataModule",
    "WebDatasetDataModule",
]
