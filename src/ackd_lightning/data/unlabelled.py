"""A folder of images without labels, to predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ackd_lightning.data.custom import CustomImagesDataModule
from ackd_lightning.data.folders import Walk
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import NO_LABEL, Files, Source
from ackd_lightning.errors import ACKDError
from ackd_lightning.validation import PositiveInt, checked


class UnlabelledFolder(CustomImagesDataModule):
    """All images in a folder and below, for prediction alone; ``ackd predict`` makes it.

    Args:
        root: Folder of the images.
        num_classes: Number of classes of the network that predicts.
        class_names: Their names in the order of the network's outputs; None when unknown.
        options: Arguments of `CustomImagesDataModule`.

    Raises:
        ACKDError: If the folder holds no images.
    """

    @checked
    def __init__(
        self, root: str | Path, *, num_classes: PositiveInt, class_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(root, **options)
        self.num_classes = num_classes
        self._names = tuple(class_names or map(str, range(num_classes)))
        self.class_names = self._names if class_names else None

    def _load(self, part: Part) -> Source:
        walk = Walk()
        paths = walk.images(self.root)
        walk.report(self.root)
        if not paths:
            raise ACKDError(f"{self.root} holds no images: set root to a folder of images")
        files = Files(self.root, self._names, tuple(paths), torch.full((len(paths),), NO_LABEL))
        return self._read(files, self.root, part)

    def prepare_data(self) -> None:
        """Do nothing; `setup` reads the folder."""

    def setup(self, stage: str | None = None) -> None:
        """List the images.

        Args:
            stage: Lightning's stage; ignored.
        """
        if not self._rows:
            source = self._load("test")
            self._sources["test"] = source
            self._rows = {"test": ("test", torch.arange(len(source.targets)))}
