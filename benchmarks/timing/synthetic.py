"""Synthetic data and fresh weights in place of data sets and teachers that are missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ackd_lightning.data.base import ImageDataModule
from ackd_lightning.data.download import DownloadedDataModule
from ackd_lightning.data.sampling import Part
from ackd_lightning.data.sources import Pixels
from ackd_lightning.errors import ACKDError
from ackd_lightning.models.weights import save_weights
from ackd_lightning.models.zoo import create_model
from ackd_lightning.runs.files import write_json
from ackd_lightning.training.module import DistillationModule
from ackd_lightning.training.teacher_cache import KEY_FILE, epoch_file, view_key

_UNKNOWN_IMAGES = 10_000
"""Number of synthetic images in place of a data set of unknown size."""
_LARGEST = 2**30
"""Largest size of the synthetic images in bytes; more images than that share memory."""


class SyntheticDataModule(ImageDataModule):
    """Random images with the shape, number and batches of another data module, whose files may be missing.

    Args:
        data: Data module to imitate; no image is held out for validation.
    """

    def __init__(self, data: ImageDataModule) -> None:
        super().__init__(
            batch_size=data.batch_size,
            eval_batch_size=data.eval_batch_size,
            val_fraction=0,
            train_fraction=data.train_fraction,
            max_per_class=data.max_per_class,
            num_workers=data.num_workers,
            seed=data.seed,
        )
        self.num_classes, self.mean, self.std = data.num_classes, data.mean, data.std
        self.input_size, self.augment = data.input_size, data.augment
        self.images = type(data).published_train_images or _UNKNOWN_IMAGES

    def _load(self, part: Part) -> Pixels:
        count = self.images if part == "train" else self.eval_batch_size
        shape = (3, self.input_size, self.input_size)
        size = 3 * self.input_size**2
        apart = max(1, min(size, _LARGEST // count))  # less than `size`: neighbouring images overlap
        pixels = torch.randint(0, 256, (apart * (count - 1) + size,), dtype=torch.uint8)
        images = pixels.as_strided((count, *shape), (apart, self.input_size**2, self.input_size, 1))
        names = tuple(f"class {number}" for number in range(self.num_classes))
        return Pixels(names, images, torch.arange(count) % self.num_classes)


def usable(data: ImageDataModule, notes: list[str]) -> ImageDataModule:
    """Set up a data module, or replace it by random images when its files are missing; nothing is downloaded.

    Args:
        data: Data module of the run.
        notes: List that a replacement is reported in.
    """
    if isinstance(data, DownloadedDataModule):
        data.download = False
    try:
        data.setup()
    except (ACKDError, OSError) as error:
        made = SyntheticDataModule(data)
        made.setup()
        side = made.input_size
        notes.append(
            f"{made.num_train_samples:,} random images of {side} x {side} in memory in place of "
            f"{type(data).__name__} ({error})"
        )
        return made
    return data


@torch.no_grad()
def fresh_network(name: str, num_classes: int, size: int, options: Mapping[str, Any]) -> nn.Module:
    """Build a network with fresh weights and BatchNorm statistics of random images, so that its outputs stay small.

    Args:
        name: Model name.
        num_classes: Number of classes K.
        size: Side of the images in pixels.
        options: Keyword arguments of the model.
    """
    network = create_model(name, num_classes, **options)
    layers = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    before = [each.momentum for each in layers]
    for layer in layers:
        layer.momentum = 1.0
    network.train()(torch.randn(16, 3, size, size))
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
    return network.eval()


def give_weights(module: DistillationModule, folder: Path, notes: list[str]) -> None:
    """Write fresh weights for every teacher whose file is missing.

    Args:
        module: Module before its teachers are loaded.
        folder: Folder for the weight files.
        notes: List that fresh weights are reported in.
    """
    configs = list(module.teachers.configs)
    for number, config in enumerate(configs):
        if isinstance(config.network, str) and not (config.weights and Path(config.weights).is_file()):
            size = config.input_size or module.data.input_size
            network = fresh_network(config.network, module.data.num_classes, size, config.options or {})
            file = save_weights(network, folder / f"teacher{number}.safetensors")
            configs[number] = replace(config, weights=str(file))
            missing = config.weights or "its weight file"
            notes.append(f"teacher {config.network} has fresh weights ({missing} does not exist)")
    module.teachers.configs = tuple(configs)


def give_cache(
    module: DistillationModule, data: ImageDataModule, folder: Path, notes: list[str], *, epochs: int, precision: str
) -> None:
    """Write random logits for every teacher's cache that does not exist.

    Args:
        module: Module whose teachers are loaded.
        data: Data module that is set up.
        folder: Folder for the cache.
        notes: List that random logits are reported in.
        epochs: Number of epochs of the run, for all of which the same logits are used.
        precision: Lightning's name of the precision.
    """
    configs = module.teachers.configs
    asked = next((each.cache for each in configs if each.cache is not None), None)
    if asked is None or Path(asked).is_dir():
        return
    folder.mkdir()
    key = view_key(module, data, precision)
    write_json(key, folder / KEY_FILE)
    logits = torch.randn(key["images"], module.data.num_classes)
    save_file({"logits": logits.bfloat16() if precision == "bf16-mixed" else logits}, epoch_file(folder, 0))
    for epoch in range(1, epochs):
        epoch_file(folder, epoch).hardlink_to(epoch_file(folder, 0))
    module.teachers.configs = tuple(replace(each, cache=str(folder)) for each in configs)
    begin = module.on_train_start

    def on_train_start() -> None:
        begin()
        assert module.cache is not None
        module.cache.compared = True  # random numbers are not the teacher's

    module.on_train_start = on_train_start  # type: ignore[method-assign]
    notes.append(f"the teacher's logits are random numbers from a file ({asked} does not exist)")
