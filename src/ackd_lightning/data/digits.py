"""Scanned digits that scikit-learn contains, so that nothing is downloaded.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(its test part, 1,797 images).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.sampling import TEST_SPLIT_SEED, Part, stratified_split
from ackd_lightning.data.sources import Pixels

_TEST_SHARE = 0.3
_NAMES = tuple(str(digit) for digit in range(10))


class DigitsDataModule(ImageDataModule):
    """The 1,797 scanned 8 x 8 digits of scikit-learn, enlarged to 16 x 16 and repeated to three channels.

    Grey levels 0 to 16 become 0 to 255, enlarged bilinearly. A fixed stratified 30 % (539 images) is the test set.
    Training images are shifted by up to 2 pixels (one scanned pixel); they are not mirrored. Arguments are those of
    [`ImageDataModule`][ackd_lightning.data.ImageDataModule].
    """

    num_classes = 10
    mean = (0.3056, 0.3056, 0.3056)  # of the training and validation images
    std = (0.3190, 0.3190, 0.3190)
    input_size = 16
    augment = "crop"
    class_names = _NAMES

    def _load(self, part: Part) -> Pixels:
        images, targets = all_digits()
        train, test = stratified_split(targets, _TEST_SHARE, split_seed=TEST_SPLIT_SEED)
        rows = train if part == "train" else test
        return Pixels(_NAMES, images[rows], targets[rows])


def all_digits() -> tuple[Tensor, Tensor]:
    """Return all digits: ``1797 x 3 x 16 x 16`` uint8 images and ``1797`` int64 class indices."""
    from sklearn.datasets import load_digits  # which imports pandas where it is installed

    content = load_digits()
    grey = torch.from_numpy(content["images"]).to(torch.float32)[:, None] * (255 / 16)
    large = F.interpolate(grey, size=(16, 16), mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(content["target"]).long()
