"""The labels of a training step: mixed by the data, smoothed and weighted by class as the recipe says."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.errors import ACKDError
from ackd_lightning.methods.base import Method, is_task_term
from ackd_lightning.models.weight_files import tell
from ackd_lightning.training.schedule import Recipe
from ackd_lightning.types import Batch


class Labels:
    """What the cross-entropies of a method learn from.

    Args:
        recipe: Label smoothing and class weights.
        num_classes: K.

    Raises:
        ACKDError: If there is not one class weight for each class.

    Examples:
        >>> labels = Labels(Recipe(label_smoothing=0.2), 4)
        >>> batch = labels(Batch(torch.zeros(1, 3, 8, 8), torch.tensor([2]), torch.tensor([0])))
        >>> [round(each, 2) for each in batch.soft[0].tolist()]
        [0.05, 0.05, 0.85, 0.05]
    """

    def __init__(self, recipe: Recipe, num_classes: int) -> None:
        self.smoothing, self.num_classes = recipe.label_smoothing, num_classes
        self.unlabelled = False
        given = recipe.class_weights
        self.automatic = given == "auto"
        self.weights: Tensor | None = None
        if given is not None and not isinstance(given, str):
            if len(given) != num_classes:
                raise ACKDError(
                    f"recipe.class_weights has {len(given)} values and the data have {num_classes} classes; give one "
                    "value for each class, or auto"
                )
            self.weights = torch.tensor(list(given), dtype=torch.float32)

    def begin_fit(self, targets: Tensor | None) -> None:
        """Compute automatic class weights, and note whether there are images without a label.

        Args:
            targets: Class of every training image, ``N`` int64, -1 without a label; None when the data module does not
                have them.

        Raises:
            ACKDError: If the targets are needed and unknown.
        """
        self.unlabelled = targets is not None and bool((targets < 0).any())
        if not self.automatic:
            return
        if targets is None:
            raise ACKDError(
                "recipe.class_weights is auto and the classes of the training images are unknown (streamed shards, or "
                "a data module without `train_targets`); list one weight for each class"
            )
        self.weights = inverse_frequency(targets, self.num_classes)

    def __call__(self, batch: Batch) -> Batch:
        """Return a batch with the labels to learn from; the same batch when nothing changes them.

        Args:
            batch: Batch with hard or mixed labels.
        """
        if not (self.smoothing or self.unlabelled) and self.weights is None:
            return batch
        labels = F.one_hot(batch.target.clamp(min=0), self.num_classes).float() if batch.soft is None else batch.soft
        labels = labels * (1 - self.smoothing) + self.smoothing / self.num_classes
        if self.weights is not None:
            self.weights = self.weights.to(labels.device)
            labels = labels * self.weights
        if self.unlabelled:
            labels = labels * (batch.target >= 0)[:, None]  # no term of a cross-entropy
        return batch._replace(soft=labels)


def inverse_frequency(targets: Tensor, num_classes: int) -> Tensor:
    """Return class weights that give every class the same share of the loss; their mean over the images is 1.

    Args:
        targets: Class of every image, ``N`` int64.
        num_classes: K.

    Returns:
        ``K`` float32; 0 for a class without images.

    Examples:
        >>> inverse_frequency(torch.tensor([0, 0, 0, 1]), 2).tolist()
        [0.6666666865348816, 2.0]
    """
    targets = targets[targets >= 0]
    counts = torch.bincount(targets.cpu(), minlength=num_classes).float()
    present = counts > 0
    return torch.where(present, len(targets) / (present.sum() * counts.clamp_min(1)), 0.0)


def accuracy(logits: Tensor, target: Tensor, soft: Tensor | None) -> Tensor:
    """Return the mean share of the labels that the predicted class has: the accuracy, for images that are not mixed.

    Args:
        logits: Logits ``B x K``.
        target: Class indices, ``B`` int64.
        soft: Shares of the classes in mixed images, ``B x K``; None for images that are not mixed.
    """
    prediction = logits.detach().argmax(dim=1)
    if soft is None:
        return (prediction == target).float().mean()
    return soft.gather(1, prediction[:, None]).mean()


def check_labels(method: Method, recipe: Recipe, data: Any) -> None:
    """Refuse labels that a method cannot learn from, and rare classes that would count twice; say what has no effect.

    Args:
        method: The method.
        recipe: Label smoothing and class weights.
        data: Data module, of which mixing and sampling are read where it has them.

    Raises:
        ACKDError: Naming the method and the setting.
    """
    name, kind = type(method).__name__, method.labels
    changed = f"label_smoothing is {recipe.label_smoothing:g}" if recipe.label_smoothing else ""
    changed = changed or ("class_weights is set" if recipe.class_weights is not None else "")
    if changed and kind == "hard":
        raise ACKDError(
            f"recipe.{changed} and method {name} reads hard labels; leave it out, or let the method read batch.labels "
            "and set `labels`"
        )
    task = [weight for term, weight in method.loss_weights.items() if is_task_term(term)]
    if data is not None and changed and task and not any(task) and not method.auxiliary_parameters():
        tell(f"recipe.{changed} and has no effect, as no cross-entropy of method {name} has a weight")
    if not isinstance(data, ImageDataModule):
        return
    if recipe.class_weights == "auto" and data.sampling == "balanced":
        raise ACKDError(
            "recipe.class_weights is auto and data.sampling is balanced, and each of them makes up for rare classes; "
            "leave one of them out"
        )
    mixing = data.augmentation.mixing()
    if mixing and kind != "mixed":
        raise ACKDError(
            f"data.augmentation mixes images ({mixing}) and {_cannot_mix(method)}; set mixup and cutmix to 0"
        )


def check_unlabelled(method: Method, targets: Tensor | None, data: Any) -> None:
    """Refuse training images without a label for a method that needs one for each.

    Args:
        method: The method.
        targets: Class of every training image, ``N`` int64, -1 without a label; None when unknown.
        data: Data module, of which mixing and sampling are read where it has them.

    Raises:
        ACKDError: Naming the method or the setting.
    """
    missing = 0 if targets is None else int((targets < 0).sum())
    if targets is None or not missing:
        return
    some = f"{missing:,} of {len(targets):,} training images have no label"
    if method.labels != "mixed":
        raise ACKDError(f"{some} and {_cannot_mix(method)}; leave them out, or use another method, such as kd")
    alone = set(method.loss_weights) <= {"ce"}
    if method.teacher == "none" and (alone or missing == len(targets)):
        reason = "learns from labels alone" if alone else "needs some labels, as it has no teacher"
        raise ACKDError(
            f"{some} and method {type(method).__name__} {reason}; "
            f"{'leave them out' if alone else 'add images with labels'}, or use a method with a teacher, such as kd"
        )
    if isinstance(data, ImageDataModule) and (data.augmentation.mixing() or data.sampling == "balanced"):
        setting = "data.augmentation mixes images" if data.augmentation.mixing() else "data.sampling is balanced"
        raise ACKDError(f"{some} and {setting}, which needs the class of every image; leave one of them out")


def check_batch(method: Method, batch: Batch) -> None:
    """Refuse a batch of mixed images for a method that cannot learn from them.

    Args:
        method: The method.
        batch: Batch of the data, whose labels are neither smoothed nor weighted.

    Raises:
        ACKDError: Naming the method.
    """
    if batch.soft is not None and method.labels != "mixed":
        raise ACKDError(
            f"the data give {batch.soft.shape[1]} shares of classes for each image and {_cannot_mix(method)}; give "
            "class indices"
        )


def check_sampling(method: Method, data: Any) -> None:
    """Refuse repeated images for a method that keeps a row for each, after ``begin_fit``.

    Args:
        method: The method.
        data: Data module, whose sampling is read where it has one.

    Raises:
        ACKDError: Naming the method.
    """
    if method.reads_index and isinstance(data, ImageDataModule) and data.sampling == "balanced":
        raise ACKDError(
            f"data.sampling is balanced, which repeats images in an epoch, and method {type(method).__name__} keeps a "
            "row for each; use recipe.class_weights instead"
        )


def _cannot_mix(method: Method) -> str:
    reason = "reads hard labels" if method.labels == "hard" else "needs the class or the index of every image"
    return f"method {type(method).__name__} {reason}"
