"""Scanned digits that come with scikit-learn: the data set that needs no network.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(its test part, 1,797 images).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from ackd_lightning.data.base import BATCH_SIZE, EVAL_BATCH_SIZE, VAL_FRACTION, ImageDataModule
from ackd_lightning.data.images import Pixels
from ackd_lightning.data.sampling import Part, stratified_split

_TEST_SHARE = 0.3
_TEST_SPLIT_SEED = 1  # not the one of the validation split, which is taken out of what remains


class DigitsDataModule(ImageDataModule):
    """The 1,797 scanned 8 x 8 digits of scikit-learn, enlarged to 16 x 16 and repeated to three channels.

    Grey levels 0 to 16 become 0 to 255, enlarged bilinearly. A fixed stratified 30 % (539 images) is the test set.
    Training images are shifted by up to 2 pixels (one scanned pixel); they are not mirrored.

    Args:
        batch_size: global training batch: each of W processes takes ``batch_size / W``.
        eval_batch_size: batch of each process in validation, test and prediction.
        val_fraction: share of the training set that is held out for validation; 0 holds nothing out.
        train_fraction: share of each class of the training part that is used, for small runs.
        max_per_class: at most so many training images of each class.
        num_workers: worker processes of each loader; results do not depend on it.
        seed: seed of shuffling and augmentation; by default the one of ``seed_everything``, or 0.
    """

    num_classes = 10
    mean = (0.3056, 0.3056, 0.3056)  # of the training and validation images
    std = (0.3190, 0.3190, 0.3190)
    input_size = 16
    augment = "crop"
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        *,
        batch_size: int = BATCH_SIZE,
        eval_batch_size: int = EVAL_BATCH_SIZE,
        val_fraction: float = VAL_FRACTION,
        train_fraction: float = 1.0,
        max_per_class: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_fraction=val_fraction,
            train_fraction=train_fraction,
            max_per_class=max_per_class,
            num_workers=num_workers,
            seed=seed,
            cache=False,
        )

    def _load(self, part: Part) -> Pixels:
        images, targets = all_digits()
        train, test = stratified_split(targets, _TEST_SHARE, split_seed=_TEST_SPLIT_SEED)
        rows = train if part == "train" else test
        return Pixels(self.class_names, images[rows], targets[rows])


def all_digits() -> tuple[Tensor, Tensor]:
    """Return all the digits: ``1797 x 3 x 16 x 16`` uint8, and ``1797`` int64 classes."""
    content = load_digits()
    grey = torch.from_numpy(content["images"]).to(torch.float32)[:, None] * (255 / 16)
    large = F.interpolate(grey, size=(16, 16), mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(content["target"]).long()
