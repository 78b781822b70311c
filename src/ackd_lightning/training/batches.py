"""Batches of any data module, as a training module reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ackd_lightning.errors import ACKDError, count_of
from ackd_lightning.methods.base import Method
from ackd_lightning.models.weight_files import tell
from ackd_lightning.types import Batch, DataInfo

_KEYS = {
    "image": ("image", "images", "pixel_values", "img", "imgs", "input", "inputs", "x"),
    "target": ("target", "targets", "label", "labels", "class", "y"),
    "index": ("index", "indices", "idx"),
}
_SUM_TOLERANCE = 1e-2  # of shares in half precision


def read_batch(
    batch: Any, data: DataInfo, *, check: bool = False, unlabelled: bool = True, targets: bool = True
) -> Batch:
    """Read a batch: ``(image, target)``, ``(image, target, index)``, or a mapping such as ``{"image": …, "label": …}``.

    Targets are class indices of any integer type, ``B`` or ``B x 1``, or ``B x K`` shares of the classes, of which
    one-hot targets are a case.

    Args:
        batch: Batch of any data module.
        data: Classes, image size and channels that the module was built for.
        check: Whether to compare the targets of a batch on a GPU with the classes, too, which waits for the GPU.
        unlabelled: Whether a target may be -1, which is an image without a label.
        targets: Whether targets are needed; otherwise ``image``, ``(image,)`` and a mapping without a target are
            batches, too, whose targets are -1.

    Raises:
        ACKDError: If the batch has another form, the images another size, or a target has more than one meaning.
    """
    if not targets and isinstance(batch, Tensor):
        batch = (batch,)
    if isinstance(batch, Batch):
        result = batch
    elif isinstance(batch, Mapping):
        image, target, index = (_entry(batch, name) for name in _KEYS)
        if target is None and not targets and isinstance(image, Tensor):
            target = _no_targets(image)
        if image is None or target is None:
            missing = "image" if image is None else "target"
            raise ACKDError(
                f"a batch has the entries {', '.join(map(str, batch))} and none of them is the {missing}; call it "
                f"{missing!r}, or give (image, target)"
            )
        result = _made(image, target, index, data, check=check, place=f"entry {_key(batch, 'index')!r}")
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        result = _made(batch[0], batch[1], batch[2] if len(batch) == 3 else None, data, check=check)
    elif not targets and isinstance(batch, (tuple, list)) and len(batch) == 1 and isinstance(batch[0], Tensor):
        result = _made(batch[0], _no_targets(batch[0]), None, data, check=False)
    else:
        form = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ACKDError(f"a batch is {form}; the data must give (image, target), or add an index")
    _check_image(result.image, data)
    if check or result.target.device.type == "cpu":
        _check_range(result.target, data.num_classes, unlabelled=unlabelled)
    return result


def _no_targets(image: Tensor) -> Tensor:
    return torch.full((image.shape[0],), -1, device=image.device)


def _key(batch: Mapping[Any, Any], name: str) -> str | None:
    return next((key for key in _KEYS[name] if batch.get(key) is not None), None)


def _entry(batch: Mapping[Any, Any], name: str) -> Any:
    key = _key(batch, name)
    return None if key is None else batch[key]


def _made(image: Any, target: Any, index: Any, data: DataInfo, *, check: bool, place: str = "third entry") -> Batch:
    for name, value in (("image", image), ("target", target)):
        if not isinstance(value, Tensor):
            raise ACKDError(f"the {name} of a batch is {type(value).__name__}; it must be a tensor")
    check = check or target.device.type == "cpu"
    target, soft = _targets(target, image.shape[0], data.num_classes, check=check)
    return Batch(
        image, target, torch.full_like(target, -1) if index is None else _index(index, len(target), place), soft
    )


def _index(index: Any, size: int, place: str) -> Tensor:
    """Return the positions of B images, ``B`` int64."""
    try:
        found = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        found = None
    other = found is not None and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found is None or found.shape != (size,) or other:
        kind = type(index).__name__
        if isinstance(index, Tensor):
            kind += f" of {index.dtype} with the shape {tuple(index.shape)}"
        elif isinstance(index, (list, tuple)) and index:
            kind = next(
                (type(each).__name__ for each in index if type(each) is not int), count_of(len(index), "number")
            )
        raise ACKDError(
            f"the {place} of a batch holds {kind} and no positions; give the position of each of its {size} images in "
            "`train_targets` there, or nothing where the method reads none"
        )
    return found.long()


def _targets(target: Tensor, size: int, classes: int, *, check: bool) -> tuple[Tensor, Tensor | None]:
    """Return class indices ``B`` int64, and shares ``B x K`` where the targets are not one class each."""
    if target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if target.ndim == 1 and len(target) == size:
        if check and target.is_floating_point() and bool((target != target.round()).any()):
            raise ACKDError(
                f"targets are numbers such as {float(target[0]):g}; they must be class indices, or one share for "
                f"each of the {classes} classes"
            )
        return target.long(), None
    if target.shape != (size, classes):
        raise ACKDError(
            f"targets have the shape {tuple(target.shape)} for {size} images and {classes} classes; they must be "
            f"{size} class indices, or {size} x {classes} shares"
        )
    if check:
        _check_shares(target)
    hard = not target.is_floating_point() or bool(((target == 0) | (target == 1)).all())
    return target.float().argmax(dim=1), None if hard else target.float()


def _check_shares(target: Tensor) -> None:
    sums = target.sum(dim=1, dtype=torch.float32)
    if bool(((sums - 1).abs() > _SUM_TOLERANCE).any()) or bool((target < 0).any()):
        raise ACKDError(
            f"the shares of the classes of an image sum up to {float(sums.min()):g} to {float(sums.max()):g}; each"
            " image must have non-negative shares that sum up to 1 (several labels for an image are not supported)"
        )


def _check_image(image: Tensor, data: DataInfo) -> None:
    if image.ndim != 4 or not image.is_floating_point():
        raise ACKDError(
            f"images are {image.dtype} of shape {tuple(image.shape)}; they must be float and normalised, B x C x H x W"
        )
    channels, *expected = data.image_shape
    found = list(image.shape[2:])
    if found != expected:
        turned = list(image.shape[1:3]) == expected
        remedy = "put the channels before height and width" if turned else "set input_size to the size of your images"
        raise ACKDError(
            f"images are {found[0]} x {found[1]} (height x width) and input_size is {expected[0]} x {expected[1]}; "
            f"{remedy}"
        )
    if image.shape[1] != channels:
        raise ACKDError(
            f"images have {image.shape[1]} channels and the data were said to have {channels}; set channels of "
            "DataInfo, or mean and std with one value for each channel"
        )


def _check_range(target: Tensor, classes: int, *, unlabelled: bool) -> None:
    if not target.numel():
        return
    low, high = int(target.min()), int(target.max())
    if low == -1 and high < classes and not unlabelled:
        raise ACKDError(
            "an image has no label (its target is -1) and the data module does not say so before the fit; give "
            "it `train_targets`, the class of every training image, N int64"
        )
    if low >= -1 and high < classes:
        return
    remedy = "subtract 1, if they run from 1 to K" if low >= 1 and high == classes else "correct them, or num_classes"
    raise ACKDError(
        f"targets run from {low} to {high} in a batch and the {classes} classes are 0 to {classes - 1}; {remedy}"
    )


def check_index(method: Method, batch: Batch, *, starts: bool) -> None:
    """Refuse images without an index where a method has a row for each, and say what it means for random numbers.

    Args:
        method: Method after ``begin_fit``.
        batch: First batch of an epoch.
        starts: Whether it is the first of the fit.

    Raises:
        ACKDError: If an index is missing and needed.
    """
    asks = method.reads_index or (method.random_by_index and starts)  # waits for a GPU
    if not asks or not bool((batch.index < 0).any()):
        return
    if method.reads_index:
        raise ACKDError(
            f"method {type(method).__name__} keeps a row for every training image and the batches have no index; let "
            "the data give (image, target, index) with the image's position in `train_targets`"
        )
    tell(
        f"method {type(method).__name__} draws random numbers for each image and the batches have no index, so that "
        "all batches of an epoch have the same ones; let the data give (image, target, index)"
    )


def require_labels(batch: Batch, *, check: bool) -> None:
    """Refuse images without a label in validation and test.

    Args:
        batch: Batch of validation or test data.
        check: Whether to look at targets on a GPU, too, which waits for the GPU.

    Raises:
        ACKDError: If a target is -1.
    """
    if (check or batch.target.device.type == "cpu") and bool((batch.target < 0).any()):
        raise ACKDError("a validation or test image has no label (its target is -1); leave such images out")
